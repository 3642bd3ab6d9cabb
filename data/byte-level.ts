/**
 * The byte-level alphabet and the word pattern of GPT-2, which Hugging Face calls the ByteLevel pre-tokenizer: text is cut
 * into words, a word is its UTF-8 bytes, and each byte is written as one printable character. Pure. Called by the
 * trainer and by the Tokenizer. Source: https://github.com/openai/gpt-2/blob/master/src/encoder.py
 */

/** Cuts text into words: their concatenation is the text. A space belongs to the word after it. */
export const WORD_PATTERN = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;

/** Character of each byte: itself where it is printable in Latin-1, else one from U+0100 on. */
export const BYTE_CHARACTERS: readonly string[] = (() => {
  const isPrintable = (byte: number): boolean => (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
  let next = 0x100;
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(isPrintable(byte) ? byte : next++));
})();

/**
 * The largest index above `from` at which `text` may be cut so that the words of both parts are the words of the whole,
 * whatever follows: before whitespace that follows something else, since no word runs from one into the other. 0: none.
 */
export function lastSafeCut(text: string, from = 0): number {
  for (let at = text.length - 1; at > from; at--) {
    if (/\s/.test(text[at]!) && !/\s/.test(text[at - 1]!)) return at;
  }
  return 0;
}
