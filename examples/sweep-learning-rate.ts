/**
 * Sweeps the learning rate: one run for each value, all from one spec, and a table of validation losses at the end, best
 * first. A run that falls behind the best by too much halfway through is cancelled, so that the rest get its workers.
 *
 *   npx cuda-nn up                                              (in another terminal)
 *   node dist/examples/sweep-learning-rate.js SPEC.json 5e-4 1e-3 2e-3 4e-3
 *
 * SPEC needs data.validation and evaluation.every. Runs are named <name>-lr-<value>.
 */
import { readFileSync } from 'node:fs';
import type { RunSpecInput } from '../config/run-spec.ts';
import { Client } from '../orchestrator/client.ts';

/** A run this much above the best validation loss at the same step, in nats a token, is given up. */
const GIVE_UP_BEHIND = 1;

const [file, ...rates] = process.argv.slice(2);
if (file === undefined || rates.length === 0) {
  process.stderr.write('usage: node dist/examples/sweep-learning-rate.js SPEC.json RATE [RATE...]\n');
  process.exit(2);
}
const base = JSON.parse(readFileSync(file, 'utf8')) as RunSpecInput;

const client = new Client();
/** Best validation loss seen at each step, over all runs. */
const best = new Map<number, number>();

/** One run of the sweep, from its enqueueing to its end. */
async function tryRate(rate: string): Promise<{ rate: string; phase: string; loss: number | null }> {
  const run = await client.train({
    ...base,
    name: `${base.name}-lr-${rate.toLowerCase()}`,
    optimizer: { ...base.optimizer, learningRate: Number(rate) },
  });
  for await (const event of run.events()) {
    if (event.type !== 'eval') continue;
    const leader = Math.min(best.get(event.step) ?? Infinity, event.loss);
    best.set(event.step, leader);
    if (event.loss > leader + GIVE_UP_BEHIND && event.step >= base.steps / 2 && event.step < base.steps) await run.cancel();
  }
  const record = await run.wait();
  return { rate, phase: record.phase, loss: record.validation?.loss ?? null };
}

try {
  const results = await Promise.all(rates.map(tryRate));
  results.sort((a, b) => (a.loss ?? Infinity) - (b.loss ?? Infinity));
  for (const { rate, phase, loss } of results) process.stdout.write(`${rate.padEnd(8)} ${phase.padEnd(10)} ${loss?.toFixed(4) ?? '-'}\n`);
} finally {
  await client.close();
}
