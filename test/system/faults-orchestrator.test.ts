/**
 * Orchestrators that die at each transition of a run, or stand still while another takes over: the run ends with the weights of
 * the undisturbed one, and its history shows that each (step, shard) counted once. The moments are seen in Redis: an effect
 * is over when its command is seen, and the next has not begun.
 */
import { expect } from 'chai';
import type { RunSpecInput } from '../../config/run-spec.ts';
import { readHistory } from '../support/history.ts';
import { QUICK, Stack } from '../support/stack.ts';
import type { Victim } from '../support/stack.ts';
import { Trace } from '../support/trace.ts';
import { until } from '../support/wait.ts';

/** A transition, and the command that shows it. `<run>` stands for the run's name. */
const TRANSITIONS: readonly (readonly [what: string, pattern: string, parallelism: number])[] = [
  ['the run is taken', '^hset nn:run:<run> driver', 1],
  ['the phase is told', '^xadd nn:run:<run>:events .*"phase":"running"', 1],
  ['workers are claimed', '^hsetnx nn:claims', 3],
  ['the control is written', '^set nn:run:<run>:control', 1],
  ['an eval is added', '^HMSET nn:eval-\\S+:<run>\\.\\d+\\.eval\\.\\d+\\.\\d+ name', 1],
  ['an eval has ended', '^XADD nn:eval-\\S+:events \\* event completed jobId <run>\\.', 1],
  ['steps are added', '^HMSET nn:train-\\S+:<run>\\.\\d+\\.steps\\.\\d+\\.\\d+ name', 1],
  ['a step is told of by its worker', '^XADD nn:train-\\S+:events .*event progress jobId <run>\\.', 1],
  ['a step counted and is published', '^xadd nn:run:<run>:events .*"type":"step"', 1],
  ['steps have ended', '^XADD nn:train-\\S+:events \\* event completed jobId <run>\\.\\d+\\.steps', 1],
  ['a flow is added', '^HMSET nn:train\\S*:<run>\\.\\d+\\.reduce\\.\\d+\\.\\d+ name', 3],
  ['a shard has ended', '^XADD nn:train\\S*:events \\* event completed jobId <run>\\.\\d+\\.shard', 3],
  ['a flow has ended', '^XADD nn:train\\S*:events \\* event completed jobId <run>\\.\\d+\\.reduce', 3],
  ['a checkpoint is added', '^HMSET nn:train-\\S+:<run>\\.\\d+\\.checkpoint\\.\\d+\\.\\d+ name', 3],
  ['a checkpoint is written', '^XADD nn:train-\\S+:events \\* event completed jobId <run>\\.\\d+\\.checkpoint', 1],
  ['a checkpoint counted and is published', '^xadd nn:run:<run>:events .*"type":"checkpoint"', 3],
  ['digests are added', '^HMSET nn:train-\\S+:<run>\\.\\d+\\.digest\\.\\d+\\.\\d+ name', 3],
  ['the last digest has come', '^XADD nn:train-\\S+:events \\* event completed jobId <run>\\.\\d+\\.digest\\.12\\.', 1],
  ['the control of a completed run is deleted', '^del nn:run:<run>:control', 3],
  ['the last word is written', '^hdel nn:run:<run> driver', 1],
];
const SPEC: Partial<RunSpecInput> = { steps: 12, evaluation: { every: 6, sequences: 2 }, checkpoint: { every: 4, keep: 2 }, compareDigestsEvery: 4 };

describe('faults: orchestrators', function () {
  this.timeout(120_000);
  let stack: Stack;
  let trace: Trace;
  let reference: string;
  let current: Victim;

  before(async () => {
    stack = await Stack.start({ settings: { ...QUICK, queue: { ...QUICK['queue'], lockDurationMs: 1_000 } } });
    current = await stack.orchestrate();
    await stack.work(3);
    await stack.train('calm', { ...SPEC, parallelism: 1 });
    reference = (await stack.finish('calm')).weightsDigest!;
    trace = await Trace.open(stack.redis.queues);
  });
  afterEach(() => stack.settle());
  after(async () => {
    trace?.close();
    await stack?.stop();
  });

  const seen = (what: string, pattern: string, run: string, act: () => void): Promise<unknown> => {
    const expression = new RegExp(pattern.replaceAll('<run>', run.replaceAll('.', '\\.')), 's');
    return trace.seen(what, expression, 30_000, () => {
      act();
      return true;
    });
  };

  for (const [number, [what, pattern, parallelism]] of TRANSITIONS.entries()) {
    it(`SIGKILL when ${what} (parallelism ${parallelism})`, async () => {
      const name = `killed-${number}`;
      const dead = seen(what, pattern, name, () => process.kill(current.pid, 'SIGKILL'));
      await stack.train(name, { ...SPEC, parallelism });
      await dead;
      await until('the orchestrator is gone', () => !current.alive);
      current = await stack.orchestrate();
      await stack.prove(name, reference);
    });
  }

  for (const parallelism of [1, 3]) {
    it(`SIGSTOP while a second one runs, then SIGCONT: it changes nothing (parallelism ${parallelism})`, async () => {
      const name = `woken-${parallelism}`;
      const stopped = current;
      const taken = seen('a step', '^xadd nn:run:<run>:events .*"type":"step"', name, () => stopped.pause());
      await stack.train(name, { ...SPEC, parallelism });
      await taken;
      const steps = stack.counted(name);
      current = await stack.orchestrate();
      await stack.reached(name, Math.min(12, steps + 4));
      stopped.resume();
      const { verdict } = await stack.prove(name, reference);
      expect(verdict.drivers).to.be.above(1);
      expect(new Set(readHistory(stack.runDirectory(name)).map(({ driver }) => driver)).size).to.equal(verdict.drivers);
      await stopped.kill();
    });
  }
});
