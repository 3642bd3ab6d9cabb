/** The four ids that every vocabulary of this project begins with. Pure; imported wherever one of them is named. */

/** By id: 0 to 3. */
export const SPECIAL_TOKENS = ['<pad>', '<unk>', '<bos>', '<eos>'] as const;

/** A target that is <pad> does not count; <bos> begins and <eos> ends a document; <unk> never comes from byte-level text. */
export const SPECIAL_IDS = { pad: 0, unk: 1, bos: 2, eos: 3 } as const;
