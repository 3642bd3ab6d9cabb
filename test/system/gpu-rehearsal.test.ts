/** The checks that test/gpu/long.ts makes of training through the queue, on the CPU with preset tiny: so that they can be trusted on a GPU. */
import { queueChecks } from '../gpu/queue-checks.ts';

describe('what is checked of a GPU through the queue, rehearsed on the CPU', function () {
  this.timeout(240_000);
  for (const { name, run } of queueChecks({ gpu: false })) it(name, async () => void (await run('')));
});
