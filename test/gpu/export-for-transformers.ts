/**
 * Writes a model with random weights in bf16 as a Hugging Face directory, and beside it a batch of tokens and this project's
 * logits on them, computed in bf16 and in float32 from those same weights, for test/gpu/compare_with_transformers.py. A program:
 * it needs a GPU, and transformers is not Node's.
 *
 *   node dist/test/gpu/export-for-transformers.js PRESET DIRECTORY
 *   python3 test/gpu/compare_with_transformers.py DIRECTORY
 */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { PRESETS } from '../../config/presets.ts';
import type { PresetName } from '../../config/presets.ts';
import { parseRunSpec } from '../../config/run-spec.ts';
import { Device } from '../../cuda/device.ts';
import { CheckpointReader, writeCheckpoint } from '../../data/checkpoint-files.ts';
import { Trainer } from '../../workers/model/trainer.ts';

const [preset, directory] = process.argv.slice(2);
if (preset === undefined || !(preset in PRESETS) || directory === undefined) {
  process.stderr.write(`usage: export-for-transformers PRESET DIRECTORY; presets: ${Object.keys(PRESETS).join(', ')}\n`);
  process.exit(2);
}
const model = PRESETS[preset as PresetName];
const [sequences, sequenceLength] = [2, 512];
const { optimizer } = parseRunSpec({ name: 'export', model: preset as PresetName, data: { train: '-' }, steps: 1, batch: { sequences, sequenceLength } });

const device = Device.open({ library: 'cuda', index: 0, threads: 0 });
const options = { model, recompute: 'none', sequences, sequenceLength, optimizer, totalSteps: 1, separateShards: false, evaluateOnly: true } as const;
const trainer = new Trainer(device, { ...options, precision: 'bf16' });
trainer.initialise(7);
const tokens = Int32Array.from({ length: sequences * sequenceLength }, (_, at) => (at * 7919 + 13) % model.vocabSize);
const inBf16 = trainer.logits(tokens);
const places = new Map(trainer.parameters.map((parameter) => [parameter.name, parameter]));
const { bytes } = await writeCheckpoint(
  directory,
  { model, step: 0, precision: 'bf16', tokenizer: null, runInfo: {}, read: (kind, name, into) => trainer.readState(kind, places.get(name)!, into) },
  { withTraining: false },
);
writeFileSync(join(directory, 'tokens.i32'), tokens);
trainer.close();

const reader = CheckpointReader.open(directory, { verify: false });
const exact = new Trainer(device, { ...options, precision: 'fp32' });
exact.loadWeights(reader);
writeFileSync(join(directory, 'logits-fp32.f32'), exact.logits(tokens));
writeFileSync(join(directory, 'logits-bf16.f32'), inBf16);
exact.close();
reader.close();
device.close();
process.stdout.write(`${JSON.stringify({ preset, directory, bytes, tokens: [sequences, sequenceLength] })}\n`);
