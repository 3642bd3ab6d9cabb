/**
 * Waits for the evals of a run that is going on, and acts on them: stops the run when the validation loss has not fallen
 * for some evals in a row (early stopping), then evaluates its newest checkpoint on another token file.
 *
 *   npx cuda-nn up                                              (in another terminal)
 *   node dist/examples/wait-for-evals.js RUN [--patience N] [--data FILE.tokens]
 *
 * Prints one line for each eval, and `test loss` at the end if there is a data file.
 */
import { resolve } from 'node:path';
import { parseArgs } from 'node:util';
import { Client } from '../orchestrator/client.ts';

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { patience: { type: 'string', default: '3' }, data: { type: 'string' } },
});
const [name] = positionals;
if (name === undefined) {
  process.stderr.write('usage: node dist/examples/wait-for-evals.js RUN [--patience N] [--data FILE.tokens]\n');
  process.exit(2);
}

const client = new Client();
try {
  const run = client.run(name);
  let best = Infinity;
  let worseInARow = 0;
  for await (const event of run.events()) {
    if (event.type !== 'eval') continue;
    worseInARow = event.loss < best ? 0 : worseInARow + 1;
    best = Math.min(best, event.loss);
    process.stdout.write(`step ${event.step}: validation loss ${event.loss.toFixed(4)}${worseInARow === 0 ? ' (best)' : ''}\n`);
    if (worseInARow >= Number(values.patience)) await run.cancel();
  }
  const { phase, checkpoint } = await run.wait();
  process.stdout.write(`${phase}\n`);
  if (values.data !== undefined && checkpoint !== null) {
    const { loss } = await client.eval({ checkpoint: resolve(checkpoint.directory), data: resolve(values.data), sequences: 32 });
    process.stdout.write(`test loss ${loss?.toFixed(4) ?? 'not finite'}\n`);
  }
} finally {
  await client.close();
}
