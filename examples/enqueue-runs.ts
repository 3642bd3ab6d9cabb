/**
 * Enqueues several training runs from a script and watches them all to their end. Written on the `Client` library; in a
 * project of your own the import is `import { Client } from 'cuda-nn'`.
 *
 *   npx cuda-nn up                                              (in another terminal)
 *   node dist/examples/enqueue-runs.js SPEC.json [SPEC.json...]
 *
 * Each SPEC is a run spec as docs/operations.md describes it; relative paths in it count from the current directory here.
 * Prints one JSON line for each run as it ends, and exits with 1 if one did not complete.
 */
import { readFileSync } from 'node:fs';
import type { RunSpecInput } from '../config/run-spec.ts';
import { Client } from '../orchestrator/client.ts';

const files = process.argv.slice(2);
if (files.length === 0) {
  process.stderr.write('usage: node dist/examples/enqueue-runs.js SPEC.json [SPEC.json...]\n');
  process.exit(2);
}

const client = new Client();
try {
  // All are queued before any is waited for: the orchestrator drives them side by side, by priority.
  const runs = [];
  for (const file of files) runs.push(await client.train(JSON.parse(readFileSync(file, 'utf8')) as RunSpecInput));
  const records = await Promise.all(
    runs.map(async (run) => {
      const record = await run.wait();
      process.stdout.write(`${JSON.stringify({ run: record.run, phase: record.phase, loss: record.lastReport?.loss, checkpoint: record.checkpoint?.directory })}\n`);
      return record;
    }),
  );
  if (records.some(({ phase }) => phase !== 'completed')) process.exitCode = 1;
} finally {
  await client.close();
}
