/**
 * How soon a run goes on after the SIGKILL of a worker or of its orchestrator, with default settings: the time from the kill to the next step that
 * counts, for a process that its supervisor starts again and for a host that is gone for good, both ways. `NN_RECOVERY_ROUNDS`
 * repeats each.
 */
import { expect } from 'chai';
import { readHistory } from '../support/history.ts';
import { Stack, signal } from '../support/stack.ts';
import { until } from '../support/wait.ts';

const ROUNDS = Number(process.env['NN_RECOVERY_ROUNDS'] ?? 1);
const BOUND_MS = 10_000;
/** The lock of a run, two searches for lost locks, and recovery. */
const TAKEOVER_MS = 20_000;

describe('faults: recovery with default settings', function () {
  this.timeout(60_000 + ROUNDS * 60_000);
  let stack: Stack;

  before(async () => {
    stack = await Stack.start({ settings: {} });
    await stack.orchestrate();
  });
  after(() => stack?.stop());

  const counted = (run: string): number[] => readHistory(stack.runDirectory(run)).flatMap((line) => (line.type === 'step' ? [line.atMs] : []));

  for (const [way, parallelism] of [['local', 1], ['flow', 3]] as const) {
    it(`a step counts within ${BOUND_MS / 1000} s of the SIGKILL of a worker (${way})`, async () => {
      const name = `recovers-${way}`;
      const hosts = [0, 1, 2].map((host) => `${way}${host}`);
      await Promise.all(hosts.map((host) => stack.work(1, host)));
      const run = await stack.train(name, { steps: 100_000, parallelism, evaluation: { every: 0, sequences: 8 }, checkpoint: { every: 50, keep: 2 } });
      for (const loss of ['process', 'host'] as const) {
        const times: number[] = [];
        for (let round = 0; round < ROUNDS; round++) {
          await stack.reached(name, stack.counted(name) + 20);
          // The one that the run has: a local run is on one of them.
          const claims = (await stack.redis.queues.call('HGETALL', 'nn:claims')) as Record<string, string> | string[];
          const held = (Array.isArray(claims) ? claims : Object.entries(claims).flat()).filter((_, index, all) => index % 2 === 0 && all[index + 1] === name);
          const prefix = held[0]!.replace(/-0$/, '');
          const beganMs = Date.now();
          signal(stack.workers.get(held[0]!)!, 'SIGKILL');
          const gone = loss === 'host' ? stack.leave(prefix) : Promise.resolve();
          await until('the next step', () => (counted(name).at(-1) ?? 0) > beganMs + 50, 30_000, 50);
          times.push(counted(name).find((atMs) => atMs > beganMs + 50)! - beganMs);
          await gone;
          if (loss === 'host') await stack.work(1, prefix);
        }
        times.sort((a, b) => a - b);
        const [median, maximum] = [times[Math.floor((times.length - 1) / 2)]!, times.at(-1)!];
        process.stderr.write(`      ${way}, ${loss} lost, ${ROUNDS} times: median ${(median / 1000).toFixed(1)} s, maximum ${(maximum / 1000).toFixed(1)} s\n`);
        expect(maximum, `${loss} lost`).to.be.below(BOUND_MS);
      }
      await run.cancel();
      await run.ended();
      await Promise.all(hosts.map((host) => stack.leave(host)));
    });
  }

  it(`a step counts within ${TAKEOVER_MS / 1000} s of the SIGKILL of the orchestrator, by another one`, async () => {
    const name = 'taken-over';
    await stack.work(1, 'over');
    const run = await stack.train(name, { steps: 100_000, parallelism: 1, evaluation: { every: 0, sequences: 8 }, checkpoint: { every: 50, keep: 2 } });
    await stack.reached(name, 20);
    const [driver] = stack.orchestrators;
    await stack.orchestrate();
    await driver!.kill();
    const killedMs = Date.now();
    await until('the next step', () => (counted(name).at(-1) ?? 0) > killedMs, 40_000, 50);
    const tookMs = counted(name).find((atMs) => atMs > killedMs)! - killedMs;
    process.stderr.write(`      orchestrator lost: ${(tookMs / 1000).toFixed(1)} s\n`);
    expect(tookMs).to.be.below(TAKEOVER_MS);
    await run.cancel();
    await run.ended();
  });
});
