/**
 * Jobs that work on a checkpoint instead of the replica at hand: its loss on a token file, and text from a prompt. Each
 * takes memory beside the replica's for as long as it runs, and none of the optimizer's. Called by thread.ts.
 */
import { join } from 'node:path';
import { NnError } from '../config/errors.ts';
import type { Message, Result } from '../config/messages.ts';
import { parseRunSpec } from '../config/run-spec.ts';
import type { Precision } from '../config/run-spec.ts';
import type { Device } from '../cuda/device.ts';
import { CheckpointReader } from '../data/checkpoint-files.ts';
import { TokenFile, requireVocabulary } from '../data/token-file.ts';
import { Tokenizer } from '../data/tokenizer.ts';
import { Decoder } from './model/decoder.ts';
import { Trainer } from './model/trainer.ts';
import type { WeightSource } from './model/trainer.ts';
import type { Places } from './places.ts';
import { evaluateFile } from './replica.ts';
import { finite } from './reports.ts';
import type { Signals } from './signals.ts';

export interface GuestOptions {
  readonly device: Device;
  /** Id of the worker, for results. */
  readonly worker: string;
  readonly signals: Signals;
  readonly places: Places;
}

/** Sequence length of an eval that names none. */
const DEFAULT_SEQUENCE_LENGTH = 256;
/** Sequences that an eval holds at once. */
const EVAL_SEQUENCES = 4;

/** A checkpoint in bf16 is computed in bf16 where the device can, in float32 elsewhere. */
const precisionOn = (device: Device, reader: CheckpointReader): Precision => (device.description.kind === 'cuda' ? reader.precision : 'fp32');

/** A checkpoint that is read for a job of its own: its bytes are compared with the manifest by the first such job. */
const openOnce = (directory: string, signals: Signals): CheckpointReader => CheckpointReader.open(directory, { verify: 'once', check: () => signals.checkStop() });

/** Weights that are read no further than the job is wanted. */
const checked = (source: WeightSource, signals: Signals): WeightSource => ({
  model: source.model,
  has: (name) => source.has(name),
  read: (name, into) => {
    signals.checkStop();
    source.read(name, into);
  },
});

/** The loss of a checkpoint on the first sequences of a token file. Throws CHECKPOINT_INVALID, DATA_INVALID, DEVICE_MEMORY, ... */
export function evaluateCheckpoint({ device, worker, signals, places }: GuestOptions, message: Message<'eval'>): Result<'eval'> {
  const startedAt = performance.now();
  if (message.checkpoint === null) throw new NnError('MESSAGE_INVALID', 'eval: neither a replica nor a checkpoint is named');
  return using(openOnce(places.of(message.checkpoint), signals), (reader) =>
    using(TokenFile.open(places.of(message.data)), (file) => {
      const { model } = reader;
      requireVocabulary(model, file);
      const sequenceLength = message.sequenceLength ?? DEFAULT_SEQUENCE_LENGTH;
      const perBatch = Math.min(EVAL_SEQUENCES, message.sequences);
      // The optimizer is never used; a spec is where its defaults are.
      const { optimizer } = parseRunSpec({
        name: 'eval', model: { ...model }, data: { train: message.data }, steps: 1, batch: { sequences: perBatch, sequenceLength },
      });
      const shape = { model, precision: precisionOn(device, reader), recompute: 'none', sequences: perBatch, sequenceLength } as const;
      return using(new Trainer(device, { ...shape, optimizer, totalSteps: 1, separateShards: false, evaluateOnly: true }), (trainer) => {
        trainer.loadWeights(checked(reader, signals));
        const { lossSum, targetTokens } = evaluateFile(trainer, file, { sequences: message.sequences, sequenceLength, perBatch }, () => signals.checkStop());
        const milliseconds = performance.now() - startedAt;
        return { worker, step: reader.step, loss: finite(lossSum / targetTokens), targetTokens, milliseconds };
      });
    }),
  );
}

/** Continues prompts with a checkpoint's model and tokenizer. Throws CHECKPOINT_INVALID, TOKENIZER_INVALID, DEVICE_MEMORY, ... */
export function generate({ device, worker, signals, places }: GuestOptions, message: Message<'generate'>): Result<'generate'> {
  const { checkpoint: named, prompts, maxTokens, ntkAlpha, ...sampling } = message;
  const checkpoint = places.of(named);
  const tokenizer = Tokenizer.load(join(checkpoint, 'tokenizer.json'));
  return using(openOnce(checkpoint, signals), (reader) => {
    const model = ntkAlpha === null ? reader.model : { ...reader.model, ntkAlpha };
    // Documents begin with <bos>: an empty prompt asks for the beginning of one.
    const beginning = tokenizer.bosId ?? tokenizer.eosId ?? 0;
    const encoded = prompts.map((prompt) => (prompt === '' ? [beginning] : tokenizer.encode(prompt)));
    const capacity = Math.max(...encoded.map((tokens) => tokens.length)) + maxTokens;
    return using(new Decoder(device, { model, precision: precisionOn(device, reader), capacity, batch: prompts.length }), (decoder) => {
      decoder.loadWeights(checked(reader, signals));
      const startedAt = performance.now();
      const completions = decoder.generate({
        ...sampling,
        prompts: encoded,
        maxTokens,
        eos: tokenizer.eosId,
        shouldStop: () => {
          signals.check();
          return signals.command === 'stop';
        },
      });
      const seconds = (performance.now() - startedAt) / 1000;
      const generated = completions.reduce((sum, tokens) => sum + tokens.length, 0);
      return {
        worker,
        completions: completions.map((tokens) => ({ text: tokenizer.decode(tokens), tokens })),
        tokensPerSecond: seconds > 0 ? generated / seconds : 0,
      };
    });
  });
}

/** Runs `work` and closes `resource`, however it ends. */
function using<Resource extends { close(): void }, Value>(resource: Resource, work: (resource: Resource) => Value): Value {
  try {
    return work(resource);
  } finally {
    resource.close();
  }
}
