/**
 * Rules of the run machine that a simulation meets too seldom to be trusted with: alarms, refusals, full disks, silence. Each
 * drives the machine by hand, one event at a time, over the fewest steps that show the rule.
 */
import { expect } from 'chai';
import type { ErrorCode } from '../../config/errors.ts';
import type { Control } from '../../config/keys.ts';
import type { Result, RunRecord, StepReport } from '../../config/messages.ts';
import { parseRunSpec } from '../../config/run-spec.ts';
import type { RunSpecInput } from '../../config/run-spec.ts';
import type { WorkerView } from '../../orchestrator/plan.ts';
import { step } from '../../orchestrator/run-machine.ts';
import { initialState, jobId, parseJobId, queuedRecord, recordOf } from '../../orchestrator/run-state.ts';
import type { Effect, JobAddress, MachineEvent, NewJob, RunSettings, RunState } from '../../orchestrator/run-state.ts';

type Told = MachineEvent extends infer Event ? (Event extends MachineEvent ? Omit<Event, 'atMs'> : never) : never;

const worker = (id: string, changes: Partial<WorkerView> = {}): WorkerView => ({
  id, incarnation: `${id}-1`, precisions: ['fp32'], state: 'idle', replica: null, startedAtMs: 0, lastExit: null, heldBy: null, ...changes,
});
const report = (at: number): StepReport => ({
  step: at, loss: 1, auxLoss: [1], expertLoad: [[1]], targetTokens: 4, gradientNorm: 1, clipScale: 1, learningRate: 1, skipped: false, nonFinite: null, milliseconds: 1,
});
const timings = { computeMs: 1, exchangeMs: 1, waitMs: 0 };
const hex = (digit: string): string => digit.repeat(32);

/** A machine with its hand on the table: every effect so far, the jobs last added, claims granted at once. */
class Table {
  state: RunState;
  effects: Effect[] = [];
  workers: WorkerView[];
  now = 0;

  /** With a `control`, as recovery finds it after `counted` steps: the caller tells the rest, and `ready`. */
  constructor(spec: Partial<RunSpecInput>, workers: string[], settings: Partial<RunSettings> = {}, control: Control | null = null, counted = 0) {
    const batch = { shards: 2, sequences: 1, sequenceLength: 4 };
    const checked = parseRunSpec({ name: 'r', model: 'tiny', data: { train: 't' }, steps: 9, batch, parallelism: workers.length, ...spec });
    this.workers = workers.map((id) => worker(id));
    this.state = initialState(
      {
        run: 'r', spec: checked, checkpointRoot: 'c', logSteps: 100, maxReplans: 3, maxKills: 3, stepsPerJob: 100, lookupMs: 300, jobTimeoutMs: 2_000,
        backoffMs: 10, backoffMaximumMs: 10, ...settings,
      },
      {
        record: { ...queuedRecord('r', checked, 0), phase: control === null ? 'queued' : 'running' }, control,
        counted: counted === 0 ? null : { step: counted, lastReport: report(counted), skippedInARow: 0, lastEvalStep: -1 }, faults: null, checkpoints: [], logThrough: 0,
      },
    );
    if (control !== null) return;
    this.tell({ type: 'workers', workers: this.workers });
    this.tell({ type: 'ready' });
  }

  tell(event: Told): this {
    const next = step(this.state, { ...event, atMs: this.now });
    this.state = next.state;
    this.effects.push(...next.effects);
    for (const effect of next.effects) {
      if (effect.type !== 'claim') continue;
      this.workers = this.workers.map((each) => (effect.workers.includes(each.id) ? { ...each, heldBy: 'r' } : each));
      this.tell({ type: 'claimed', workers: this.workers });
    }
    return this;
  }

  /** Time passes, and the clock is heard. */
  wait(milliseconds: number): this {
    this.now += milliseconds;
    return this.tell({ type: 'tick' });
  }

  get added(): NewJob[] {
    return this.effects.flatMap((effect) => (effect.type === 'add' ? [effect.job] : effect.type === 'flow' ? [effect.parent, ...effect.children] : []));
  }

  last(name: NewJob['name']): NewJob {
    const job = this.added.findLast((each) => each.name === name);
    if (job === undefined) throw new Error(`no ${name} job was added`);
    return job;
  }

  get faults(): (ErrorCode | 'BUG')[] {
    return this.state.shown.faults.map((fault) => fault.error.code);
  }

  get counted(): number[] {
    return this.effects.flatMap((effect) => (effect.type === 'metrics' && effect.line.type === 'step' ? [effect.line.report.step] : []));
  }

  fail(job: NewJob, code: ErrorCode): this {
    return this.tell({ type: 'failed', id: job.id, error: { code, message: code, context: {} } });
  }

  /** Of the newest flow, unless `old` names the job. */
  completeShard(shard: number, digest: string, by: string, old?: NewJob): this {
    const job = old ?? this.added.findLast((each) => each.name === 'shard' && (each.data as { shard: number }).shard === shard)!;
    const { epoch, step: at } = job.data as { epoch: number; step: number };
    const result: Result<'shard'> = {
      worker: by, epoch, step: at, shard, lossSum: 1, auxLossSum: [1], expertLoad: [[1]], targetTokens: 4, digest, key: 'k', bytes: 4, timings,
    };
    return this.tell({ type: 'completed', id: job.id, result });
  }

  completeReduce(by = this.workers[0]!.id, { id, data } = this.last('reduce')): this {
    const { epoch, step: at, shardCount } = data as { epoch: number; step: number; shardCount: number };
    const shards = Array.from({ length: shardCount }, (_, shard) => ({ shard, worker: by, epoch, digest: hex(String(shard)) }));
    return this.tell({ type: 'completed', id, result: { worker: by, epoch, digest: hex('0'), key: 'k', bytes: 4, report: report(at), timings, shards } });
  }

  completeSteps(done: number): this {
    const { id, data, worker: by } = this.last('steps');
    const { epoch, fromStep } = data as { epoch: number; fromStep: number };
    const reports = Array.from({ length: done }, (_, index) => report(fromStep + 1 + index));
    return this.tell({ type: 'completed', id, result: { worker: by, epoch, fromStep, stepsDone: done, reports, timings } });
  }

  /** Of the newest checkpoint, unless `job` is named. */
  copied(job = this.last('checkpoint')): this {
    const { epoch, step: at } = job.data as { epoch: number; step: number };
    return this.tell({ type: 'progress', id: job.id, data: { worker: job.worker!, epoch, step: at, copied: true } });
  }

  saved(job = this.last('checkpoint')): this {
    const { epoch, step: at, directory } = job.data as { epoch: number; step: number; directory: string };
    return this.tell({ type: 'completed', id: job.id, result: { worker: job.worker!, epoch, step: at, directory, bytes: 1, milliseconds: 1 } });
  }

  completeDigest(job: NewJob, digest: string): this {
    const { epoch, step: at } = job.data as { epoch: number; step: number };
    return this.tell({ type: 'completed', id: job.id, result: { worker: job.worker!, epoch, step: at, digest, weightsDigest: null } });
  }
}

describe('run machine: a checkpoint that is written beside the steps', () => {
  const begun = (spec: Partial<RunSpecInput> = {}, workers = ['a'], settings: Partial<RunSettings> = {}): Table => {
    const table = new Table({ parallelism: workers.length, checkpoint: { every: 3 }, ...spec }, workers, settings);
    if (workers.length === 1) table.completeSteps(3);
    else table.completeReduce().completeReduce().completeReduce();
    return table;
  };

  it('frees the run for the next steps once it is copied, and nothing rests on it before it is complete', () => {
    const table = begun();
    const checkpoint = table.last('checkpoint');
    expect(table.last('steps').data).to.include({ fromStep: 0 });
    table.copied();
    expect(table.last('steps').data).to.deep.include({ fromStep: 3, checkpoint: null });
    expect(table.state).to.include({ sharedVersion: 0, trimmedThrough: 0 });
    expect(table.state.checkpoints).to.deep.equal([]);
    table.copied(checkpoint).saved(checkpoint);
    expect(table.state.checkpoints).to.deep.equal([{ directory: 'c/step-3', step: 3 }]);
    expect(table.state.sharedVersion).to.equal(3);
    table.saved(checkpoint).copied(checkpoint);
    expect(table.state.saving).to.equal(null);
    expect(table.faults).to.deep.equal([]);
  });

  it('is the only one: the next that is due waits for it, and is then begun at once', () => {
    const table = begun().copied();
    const first = table.last('checkpoint');
    table.completeSteps(3);
    expect(table.state).to.include({ version: 6, activity: null });
    expect(table.last('checkpoint')).to.equal(first);
    table.saved(first);
    expect(table.last('checkpoint').data).to.include({ step: 6 });
  });

  it('is complete before the run is, and before a pause', () => {
    const last = begun({ steps: 3 }).copied();
    expect(last.added.some((job) => job.name === 'digest')).to.equal(false);
    last.saved();
    expect(last.last('digest').data).to.include({ step: 3 });
    const paused = begun().copied();
    paused.tell({ type: 'wish', wish: 'pause' }).completeSteps(0);
    expect(paused.state).to.include({ phase: 'pausing', activity: null });
    paused.saved();
    expect(paused.state.phase).to.equal('paused');
  });

  it('counts whatever became of its epoch, while its worker lives', () => {
    const table = begun({}, ['a', 'b']).copied();
    const checkpoint = table.last('checkpoint');
    table.fail(table.last('reduce'), 'TIMEOUT');
    expect(table.state.epoch).to.equal(1);
    table.saved(checkpoint);
    expect(table.state.checkpoints.map((each) => each.step)).to.deep.equal([3]);
  });

  it('that fails or is lost disturbs nothing else, and the next boundary is checkpointed', () => {
    const ends: ((table: Table, job: NewJob) => Table)[] = [
      (table, job) => table.fail(job, 'TIMEOUT'),
      (table, { id }) => table.tell({ type: 'missing', id }),
      (table) => table.tell({ type: 'workers', workers: (table.workers = table.workers.filter(({ id }) => id !== table.last('checkpoint').worker)) }),
    ];
    for (const [index, end] of ends.entries()) {
      const table = begun({ parallelism: 2 }, ['a', 'b'], {}).copied();
      const { epoch } = table.state;
      end(table, table.last('checkpoint'));
      expect(table.state.saving).to.equal(null);
      expect(table.faults.length).to.equal(index === 2 ? 2 : 1);
      expect(table.state.epoch).to.equal(index === 2 ? epoch + 1 : epoch);
      expect(table.state.checkpoints).to.deep.equal([]);
      if (index === 2) continue;
      const { id } = table.last('checkpoint');
      table.completeReduce().completeReduce();
      expect(table.last('checkpoint').id).to.equal(id);
      table.completeReduce();
      expect(table.last('checkpoint').data).to.include({ step: 6 });
    }
  });

  it('that fails while the run still stands there is tried again at once, under another id, later each time, and not for ever', () => {
    const table = begun({ steps: 3 }, ['a'], { maxReplans: 2 });
    const ids = new Set<string>();
    for (let attempt = 0; attempt < 3; attempt++) {
      expect(table.state.phase).to.equal('running');
      ids.add(table.copied().last('checkpoint').id);
      table.fail(table.last('checkpoint'), 'TIMEOUT').wait(20);
    }
    expect(ids.size).to.equal(3);
    expect(table.state.shown.error).to.deep.include({ code: 'TIMEOUT' });
  });

  it('that meets a full disk pauses the run at the step boundary, its replica kept; resume checkpoints first', () => {
    const table = begun().copied();
    table.fail(table.last('checkpoint'), 'DISK_FULL');
    expect(table.state.phase).to.equal('pausing');
    expect(table.state.command).to.equal('yield');
    table.completeSteps(2);
    expect(table.state).to.include({ phase: 'paused', version: 5 });
    expect(table.state.claims).to.deep.equal(['a']);
    expect(table.state.home).to.deep.include({ id: 'a' });
    table.tell({ type: 'wish', wish: 'resume' });
    expect(table.last('checkpoint').data).to.include({ step: 5 });
    table.copied().saved();
    expect(table.last('steps').data).to.deep.include({ fromStep: 5 });
    expect(table.state).to.deep.include({ phase: 'running', diskFull: false, checkpoints: [{ directory: 'c/step-5', step: 5 }] });
  });

  it('is not kept when its replica turns out to differ', () => {
    const table = begun({ compareDigestsEvery: 3, batch: { shards: 3, sequences: 1, sequenceLength: 4 } }, ['a', 'b', 'c']).copied();
    const by = table.last('checkpoint').worker!;
    for (const job of table.added.filter((each) => each.name === 'digest')) table.completeDigest(job, hex(job.worker === by ? '2' : '1'));
    expect(table.state.saving).to.include({ unwanted: true });
    table.saved();
    expect(table.state.checkpoints).to.deep.equal([]);
    expect(table.effects).to.deep.include({ type: 'deleteCheckpoints', directories: ['c/step-3'] });
  });

  it('saves computing its steps again when the run had fallen back behind it', () => {
    const table = new Table({ parallelism: 1, checkpoint: { every: 3 } }, ['a', 'b']);
    table.completeSteps(3).copied();
    const checkpoint = table.last('checkpoint');
    table.workers = table.workers.map((each) => (each.id === 'a' ? { ...each, state: 'draining' } : each));
    table.tell({ type: 'workers', workers: table.workers }).completeSteps(1);
    // The way leads to b, but the version is only with a: what is being written is waited for, and then a's newest is written.
    expect(table.state).to.include({ version: 4, activity: null });
    table.state = { ...table.state, home: null };
    table.wait(1);
    expect(table.last('steps')).to.include({ worker: 'b' });
    expect(table.last('steps').data).to.include({ fromStep: 0 });
    table.saved(checkpoint).fail(table.last('steps'), 'TIMEOUT');
    expect(table.last('steps').data).to.deep.include({ fromStep: 3, checkpoint: { directory: 'c/step-3', step: 3 } });
  });

  it('is taken up by the next orchestrator as what it is', () => {
    const job: JobAddress = { queue: 'train', worker: 'a', id: jobId('r', 0, 'checkpoint', 3, 2) };
    const spec = begun().state.settings.spec;
    const data = { run: 'r', epoch: 0, checkpoint: null, spec, step: 3, directory: 'c/step-3' };
    const adopt = (epoch: number, progress: unknown, startedAtMs = 0): Table => {
      const table = new Table({ parallelism: 1, checkpoint: { every: 3 } }, ['a'], {}, { epoch, command: 'run' }, 3);
      table.workers = [worker('a', { heldBy: 'r', startedAtMs, replica: { run: 'r', step: 3 } })];
      return table.tell({ type: 'workers', workers: table.workers }).tell({ type: 'adopt', job, data, processedAtMs: 5, finished: false, progress, related: [] }).tell({ type: 'ready' });
    };
    const copied = { worker: 'a', epoch: 0, step: 3, copied: true };
    expect(adopt(0, null).state).to.deep.include({ saving: null }).and.to.have.nested.property('activity.kind', 'checkpoint');
    for (const epoch of [0, 4]) {
      const table = adopt(epoch, copied);
      expect(table.state.saving).to.include({ step: 3 });
      expect(table.last('steps').data).to.include({ fromStep: 3 });
    }
    expect(adopt(4, null).state.saving).to.equal(null);
    const dead = adopt(0, copied, 7);
    expect(dead.state.saving).to.equal(null);
    expect(dead.faults).to.deep.equal(['WORKER_LOST']);
  });
});

describe('run machine: exactly once', () => {
  it('late, doubled and old reports change nothing', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    const { id, data } = table.last('steps');
    const { epoch } = data as { epoch: number };
    const progress = (at: number, job = id): Table => table.tell({ type: 'progress', id: job, data: { worker: 'a', epoch, report: report(at) } });
    for (const at of [1, 2, 2, 1, 4, 3, 3]) progress(at);
    expect(table.counted).to.deep.equal([1, 2, 3, 4]);
    progress(5, 'r.99.steps.0.0');
    progress(5, 'other.0.steps.0.0');
    expect(table.counted).to.deep.equal([1, 2, 3, 4]);
    table.fail(table.last('steps'), 'TIMEOUT');
    progress(5);
    table.tell({ type: 'completed', id, result: {} });
    expect(table.counted).to.deep.equal([1, 2, 3, 4]);
    expect(table.state.epoch).to.be.above(epoch);
  });

  it('a second gradient of a shard that differs raises an alarm that names both workers', () => {
    const table = new Table({}, ['a', 'b']);
    const old = table.added.find((job) => job.name === 'shard')!;
    table.completeShard(0, hex('1'), 'a').completeShard(0, hex('1'), 'b');
    expect(table.faults).to.deep.equal([]);
    table.fail(table.last('reduce'), 'GRADIENT_LOST');
    table.completeShard(0, hex('2'), 'b');
    expect(table.faults).to.deep.equal(['GRADIENT_LOST', 'REPLICA_DIVERGED']);
    expect(table.state.shown.faults.at(-1)!.error.context).to.include({ step: 1, shard: 0, first: 'a', second: 'b' });
    table.completeReduce().completeShard(0, hex('3'), 'a', old);
    expect(table.faults.at(-1)).to.equal('REPLICA_DIVERGED');
    expect(table.counted).to.deep.equal([1]);
  });
});

describe('run machine: replicas that differ', () => {
  const differing = (...digests: string[]): Table => {
    const batch = { shards: 3, sequences: 1, sequenceLength: 4 };
    const table = new Table({ batch, compareDigestsEvery: 1 }, ['a', 'b', 'c'].slice(0, digests.length));
    table.completeReduce();
    const jobs = table.added.filter((job) => job.name === 'digest');
    expect(jobs.map((job) => job.worker)).to.have.members(table.workers.map(({ id }) => id));
    for (const [index, job] of jobs.entries()) table.completeDigest(job, digests[index]!);
    return table;
  };

  it('agree: the next step', () => {
    const table = differing(hex('1'), hex('1'), hex('1'));
    expect(table.faults).to.deep.equal([]);
    expect(table.last('reduce').data).to.include({ step: 2 });
  });

  it('a minority is named, and its process not used again', () => {
    const table = differing(hex('1'), hex('2'), hex('1'));
    expect(table.faults).to.deep.equal(['REPLICA_DIVERGED']);
    expect(table.state.shown.faults[0]!.error.message).to.include('worker b');
    expect(table.last('reduce').data).to.include({ step: 2 });
    expect(table.state.way!.workers).to.have.members(['a', 'c']);
    table.workers = table.workers.map((each) => (each.id === 'b' ? worker('b', { incarnation: 'b-2' }) : each));
    table.tell({ type: 'workers', workers: table.workers }).completeReduce();
    expect(table.state.way!.workers).to.have.members(['a', 'b', 'c']);
  });

  it('without a majority all begin again at the checkpoint, here the beginning', () => {
    const table = differing(hex('1'), hex('2'));
    expect(table.faults).to.deep.equal(['REPLICA_DIVERGED', 'REPLICA_DIVERGED']);
    expect(table.last('reduce').data).to.include({ step: 1 });
    expect(table.state.epoch).to.equal(1);
  });
});

describe('run machine: failures', () => {
  it('a retriable failure is planned again, later each time, and fails the run after maxReplans in a row', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    for (let plan = 0; plan < 3; plan++) {
      table.fail(table.last('steps'), 'TIMEOUT');
      expect(table.state.phase).to.equal('running');
      table.wait(20);
    }
    expect(table.added.filter((job) => job.name === 'steps').length).to.equal(4);
    table.fail(table.last('steps'), 'TIMEOUT');
    expect(table.state.phase).to.equal('failed');
    expect(table.state.shown.error).to.have.property('code', 'TIMEOUT');
    expect(table.effects.at(-1)).to.deep.equal({ type: 'finish' });
  });

  it('a new step forgives what was before it', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    for (let plan = 0; plan < 10; plan++) {
      const job = table.last('steps');
      const { epoch, fromStep } = job.data as { epoch: number; fromStep: number };
      if (plan < 8) table.tell({ type: 'progress', id: job.id, data: { worker: 'a', epoch, report: report(fromStep + 1) } });
      table.fail(job, 'TIMEOUT').wait(20);
    }
    expect(table.state.phase).to.equal('running');
  });

  it('what no attempt cures, a bug, and a message that is none, fail the run at once', () => {
    for (const code of ['DEVICE_MEMORY', 'TOKEN_FILE_INVALID'] as const) {
      const refused = new Table({ parallelism: 1 }, ['a']);
      refused.fail(refused.last('steps'), code);
      expect(refused.state.phase).to.equal('failed');
      expect(refused.state.shown.error).to.have.property('code', code);
    }
    const table = new Table({ parallelism: 1 }, ['a']);
    table.tell({ type: 'completed', id: table.last('steps').id, result: { nonsense: true } });
    expect(table.state.shown.error).to.have.property('code', 'MESSAGE_INVALID');
  });

  it('a gradient that stays lost sends the run back to its checkpoint', () => {
    const table = new Table({}, ['a', 'b']);
    table.completeReduce().completeReduce();
    expect(table.last('reduce').data).to.include({ step: 3 });
    table.fail(table.last('shard'), 'GRADIENT_LOST');
    expect(table.last('reduce').data).to.include({ step: 3 });
    table.fail(table.last('shard'), 'GRADIENT_LOST').wait(20);
    expect(table.last('reduce').data).to.include({ step: 1 });
    expect(table.state.step).to.equal(2);
    for (let at = 1; at <= 3; at++) table.completeReduce();
    expect(table.counted).to.deep.equal([1, 2, 3]);
  });

  it('a full disk keeps the old checkpoint and the replica, and pauses the run; resume tries again', () => {
    const table = new Table({ parallelism: 1, checkpoint: { every: 3 } }, ['a']);
    table.completeSteps(3).fail(table.last('checkpoint'), 'DISK_FULL');
    expect(table.state).to.include({ phase: 'paused' });
    expect(table.state.claims).to.deep.equal(['a']);
    expect(table.faults).to.deep.equal(['DISK_FULL']);
    const { id } = table.last('checkpoint');
    table.tell({ type: 'wish', wish: 'resume' });
    expect(table.state.phase).to.equal('running');
    expect(table.last('checkpoint')).to.deep.include({ worker: 'a', name: 'checkpoint' });
    expect(table.last('checkpoint').id).not.to.equal(id);
    expect(table.last('checkpoint').data).to.include({ step: 3 });
  });

  it('a damaged checkpoint is named and the one before used', () => {
    const table = new Table({ parallelism: 1, checkpoint: { every: 3 } }, ['a']);
    for (const at of [3, 6]) {
      table.completeSteps(3);
      const { id, data } = table.last('checkpoint');
      const { directory, epoch } = data as { directory: string; epoch: number };
      table.tell({ type: 'completed', id, result: { worker: 'a', epoch, step: at, directory, bytes: 1, milliseconds: 1 } });
    }
    table.fail(table.last('steps'), 'CHECKPOINT_INVALID');
    expect(table.effects.at(-1)).to.deep.equal({ type: 'findCheckpoints' });
    const bad = { directory: 'c/step-6', error: { code: 'CHECKPOINT_INVALID', message: 'damaged', context: {} } } as const;
    table.tell({ type: 'checkpoints', good: [{ directory: 'c/step-3', step: 3 }], bad: [bad] });
    expect(table.last('steps').data).to.deep.include({ fromStep: 3, checkpoint: { directory: 'c/step-3', step: 3 } });
    expect(table.state.step).to.equal(6);
    expect(table.state.shown.faults.map((fault) => fault.what)).to.include('checkpoint c/step-6');
  });
});

describe('run machine: checkpoints that cannot be read', () => {
  const failing = (code: ErrorCode, path: string, initialCheckpoint?: string): Table => {
    const table = new Table({ parallelism: 1, ...(initialCheckpoint === undefined ? {} : { initialCheckpoint }) }, ['a']);
    return table.tell({ type: 'failed', id: table.last('steps').id, error: { code, message: code, context: { path } } });
  };

  it('are looked for again when they are the run\'s own, also when none is known any more', () => {
    for (const table of [failing('CHECKPOINT_INVALID', 'c/step-3'), failing('FILE_NOT_FOUND', 'c/step-3/config.json'), failing('CHECKPOINT_INVALID', 'c/step-3', '/base')]) {
      expect(table.effects.at(-1)).to.deep.equal({ type: 'findCheckpoints' });
      table.tell({ type: 'checkpoints', good: [], bad: [] });
      expect(table.last('steps').data).to.deep.include({ fromStep: 0, checkpoint: null });
    }
  });

  it('fail the run when it is the one that it began with, or no checkpoint at all', () => {
    for (const table of [failing('CHECKPOINT_INVALID', '/base', '/base'), failing('FILE_NOT_FOUND', '/base/config.json', '/base'), failing('FILE_NOT_FOUND', '/data.tokens')]) {
      expect(table.state.phase).to.equal('failed');
    }
  });
});

describe('run machine: who holds what', () => {
  const seen = (table: Table, ...workers: WorkerView[]): Table => table.tell({ type: 'workers', workers: (table.workers = workers) });

  it('whoever joins during a step may take its jobs, so its death is noticed too', () => {
    const table = new Table({}, ['a', 'b']);
    expect(table.last('reduce').worker).to.equal(null);
    const [a, b] = table.workers;
    seen(table, a!, b!, worker('c'));
    expect(table.state.epoch).to.equal(0);
    seen(table, a!, b!);
    expect(table.faults).to.deep.equal(['WORKER_LOST']);
    expect(table.last('reduce').data).to.include({ step: 1, epoch: 1 });
  });

  it('a worker of another run that reduced a step is no place for this run\'s checkpoint', () => {
    const table = new Table({ checkpoint: { every: 1 } }, ['a', 'b']);
    const [a, b] = table.workers;
    seen(table, a!, b!, worker('c', { heldBy: 'other' })).completeReduce('c');
    expect(table.state.home).to.equal(null);
    expect(table.last('checkpoint').worker).to.equal('a');
  });

  it('a worker that is ahead of what was counted is no home: the run goes back to what is shared', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    const { id } = table.last('steps');
    for (const at of [1, 2, 4]) table.tell({ type: 'progress', id, data: { worker: 'a', epoch: 0, report: report(at) } });
    table.fail(table.last('steps'), 'TIMEOUT');
    expect(table.state.home).to.equal(null);
    expect(table.last('steps').data).to.include({ fromStep: 0 });
    table.completeSteps(9);
    expect(table.counted).to.deep.equal([1, 2, 3, 4, 5, 6, 7, 8, 9]);
  });

  it('its only replica lost, the run falls back, and nothing of before has effect', () => {
    const table = new Table({ parallelism: 1, checkpoint: { every: 3 } }, ['a', 'b']);
    table.completeSteps(3);
    const old = table.last('checkpoint');
    seen(table, table.workers[1]!);
    expect(table.last('steps')).to.include({ worker: 'b' });
    expect(table.last('steps').data).to.include({ fromStep: 0 });
    expect(parseJobId(table.last('steps').id)!.epoch).to.be.above(parseJobId(old.id)!.epoch);
  });

  it('a flow of an orchestrator that died is given up unless it ended; a job of a process that died is not waited for', () => {
    const before = new Table({}, ['a', 'b']);
    const address = ({ queue, worker: by, id }: NewJob): JobAddress => ({ queue, worker: by, id });
    const recovered = (table: Table, startedAtMs: number): Table => {
      const after = new Table({ parallelism: table.state.settings.spec.parallelism }, ['a', 'b'], {}, { epoch: 0, command: 'run' });
      after.workers = ['a', 'b'].map((id) => worker(id, { heldBy: 'r', startedAtMs }));
      after.tell({ type: 'workers', workers: after.workers });
      return after;
    };
    const flow = before.last('reduce');
    const adopted = recovered(before, 0).tell({ type: 'adopt', job: address(flow), data: flow.data, processedAtMs: 5, finished: false, progress: null, related: [] }).tell({ type: 'ready' });
    expect(adopted.state.epoch).to.equal(1);
    expect(adopted.last('reduce').data).to.include({ step: 1, epoch: 1 });
    const comparison: JobAddress = { queue: 'train', worker: 'a', id: jobId('r', 0, 'digest', 0, 0) };
    for (const [finished, epoch] of [[true, 0], [false, 1]] as const) {
      const table = recovered(before, 0).tell({ type: 'adopt', job: comparison, data: {}, processedAtMs: 5, finished, progress: null, related: [] });
      expect(table.state.epoch).to.equal(epoch);
    }
    const alone = new Table({ parallelism: 1 }, ['a', 'b']);
    const job = alone.last('steps');
    for (const [startedAtMs, epoch] of [[3, 0], [7, 1]] as const) {
      const table = recovered(alone, startedAtMs).tell({ type: 'adopt', job: address(job), data: job.data, processedAtMs: 5, finished: false, progress: null, related: [] }).tell({ type: 'ready' });
      expect(table.state.epoch, `worker started at ${startedAtMs}, job was taken at 5`).to.equal(epoch);
    }
  });
});

describe('run machine: a share of the workers', () => {
  const given = (table: Table, ...ids: string[]): Table => table.tell({ type: 'workers', workers: table.workers, share: { workers: ids, reason: 'shares with another' } });
  const commands = (table: Table): string[] => table.effects.flatMap((effect) => (effect.type === 'control' ? [effect.control.command] : []));
  const released = (table: Table): string[] => table.effects.flatMap((effect) => (effect.type === 'release' ? effect.workers : []));

  it('a worker that is another run\'s to use is given up at the step boundary, when what it has is written down', () => {
    const table = given(new Table({ parallelism: 1 }, ['a']));
    expect(commands(table).at(-1)).to.equal('yield');
    expect(given(table).effects.filter((effect) => effect.type === 'control' && effect.control.command === 'yield').length).to.equal(1);
    table.completeSteps(3);
    expect(table.last('checkpoint')).to.include({ worker: 'a' });
    expect(released(table)).to.deep.equal([]);
    const { id, data } = table.last('checkpoint');
    const { directory, epoch } = data as { directory: string; epoch: number };
    table.tell({ type: 'completed', id, result: { worker: 'a', epoch, step: 3, directory, bytes: 1, milliseconds: 1 } });
    expect(released(table)).to.deep.equal(['a']);
    expect(table.state.way).to.deep.include({ workers: [], reason: 'waiting: shares with another' });
    expect(table.state.phase).to.equal('running');
    table.workers = [worker('a')];
    given(table, 'a').completeSteps(6);
    expect(table.counted).to.deep.equal([1, 2, 3, 4, 5, 6, 7, 8, 9]);
    expect(table.state.epoch).to.equal(0);
  });

  it('what is written down already is not written again', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    given(table).completeSteps(0);
    expect(table.added.map(({ name }) => name)).to.deep.equal(['steps']);
    expect(released(table)).to.deep.equal(['a']);
  });

  it('a run that was paused without a worker asks nothing of the one that it gave up', () => {
    const table = new Table({ parallelism: 2 }, ['a', 'b']);
    given(table).completeReduce('a');
    expect(released(table)).to.have.members(['a', 'b']);
    table.tell({ type: 'wish', wish: 'pause' });
    expect(table.state.phase).to.equal('paused');
    expect(table.added.map(({ name }) => name)).not.to.include('checkpoint');
  });

  it('a flow goes on with fewer from its next step on, and waits for who is not released yet', () => {
    const table = given(new Table({ parallelism: 2 }, ['a', 'b']), 'b');
    expect(released(table)).to.deep.equal([]);
    table.completeReduce('a');
    expect(released(table)).to.deep.equal(['a']);
    expect(table.state.way).to.deep.include({ exchange: 'local', workers: ['b'] });
    const other = new Table({ parallelism: 1 }, []);
    other.workers = [worker('c', { heldBy: 'other' })];
    expect(given(other, 'c').state.way!.reason).to.equal('waiting: other gives up a worker at its next step');
  });
});

describe('run machine: a limit of time', () => {
  const limited = (spec: Partial<RunSpecInput> = {}, workers = ['a']): Table => new Table({ parallelism: Math.max(1, workers.length), maxDurationSeconds: 10, ...spec }, workers);
  const commands = (table: Table): string[] => table.effects.flatMap((effect) => (effect.type === 'control' ? [effect.control.command] : []));
  const completeCheckpoint = (table: Table): Table => {
    const { id, data, worker: by } = table.last('checkpoint');
    const { directory, epoch, step: at } = data as { directory: string; epoch: number; step: number };
    return table.tell({ type: 'completed', id, result: { worker: by, epoch, step: at, directory, bytes: 1, milliseconds: 1 } });
  };

  it('ends an attempt at the step boundary, after a checkpoint, with a code of its own', () => {
    const table = limited().wait(9_999);
    expect(commands(table)).not.to.include('yield');
    table.wait(1);
    expect(commands(table).at(-1)).to.equal('yield');
    expect(table.state.phase).to.equal('running');
    table.completeSteps(4);
    expect(table.last('checkpoint').data).to.include({ step: 4 });
    completeCheckpoint(table);
    expect(table.state).to.include({ phase: 'failed', step: 4 });
    expect(table.state.shown.error).to.have.property('code', 'TIME_LIMIT');
    expect(table.state.shown.attempts.at(-1)).to.deep.include({ number: 1, fromStep: 0, toStep: 4, runningMs: 10_000, phase: 'failed' });
  });

  it('lets the step of a flow end; what is shared is written down by whoever is there', () => {
    const table = limited({}, ['a', 'b']).wait(12_000);
    expect(table.state.phase).to.equal('running');
    table.completeReduce('stranger');
    expect(table.last('checkpoint').data).to.include({ step: 1 });
    expect(completeCheckpoint(table).state.phase).to.equal('failed');
  });

  it('does not count time in a pause, nor time without an orchestrator', () => {
    const table = limited().wait(6_000).tell({ type: 'wish', wish: 'pause' }).completeSteps(2);
    completeCheckpoint(table);
    expect(table.state.phase).to.equal('paused');
    table.wait(60_000).tell({ type: 'wish', wish: 'resume' }).wait(3_999);
    expect(table.state.ending).to.equal(null);
    table.wait(2);
    expect(table.state.ending).to.have.property('code', 'TIME_LIMIT');
  });

  it('fails at once where nobody has anything, and on a disk that is full; a run whose steps are all done completes', () => {
    expect(limited({}, []).wait(10_000).state.shown.error).to.have.property('code', 'TIME_LIMIT');
    const full = limited().wait(10_000).completeSteps(1);
    expect(full.fail(full.last('checkpoint'), 'DISK_FULL').state.shown.error).to.have.property('code', 'TIME_LIMIT');
    const done = limited().completeSteps(9).wait(20_000);
    completeCheckpoint(done);
    expect(done.state.ending).to.equal(null);
    expect(done.last('digest').data).to.include({ step: 9 });
  });
});

describe('run machine: work that ends its worker', () => {
  /** The worker dies with `job` in hand, and its successor tells how. */
  const die = (table: Table, job: NewJob, id: string, signal = 'SIGSEGV', stderr = 'moe.c:7: slot < slots'): Table => {
    const incarnation = `${id}-${++deaths}`;
    const error = { code: 'WORKER_LOST', message: 'lost', context: { stderr } } as const;
    table.workers = table.workers.map((each) => (each.id === id ? worker(id, { incarnation, heldBy: 'r', lastExit: { job: job.id, code: null, signal, error, atMs: 0 } }) : each));
    return table.tell({ type: 'workers', workers: table.workers }).wait(20);
  };
  let deaths = 1;

  it('fails the run the third time, with the evidence, whatever worker it was given to', () => {
    const table = new Table({ parallelism: 2 }, ['a', 'b']);
    for (const id of ['a', 'b', 'a']) {
      expect(table.state.phase).to.equal('running');
      die(table, table.added.findLast((job) => job.name === 'shard' && (job.data as { shard: number }).shard === 1)!, id);
    }
    expect(table.state.phase).to.equal('failed');
    const { code, message, context } = table.state.shown.error!;
    expect(code).to.equal('JOB_FATAL');
    expect(message).to.contain('shard 1 of step 1').and.contain('a by SIGSEGV, b by SIGSEGV, a by SIGSEGV').and.contain('slot < slots');
    expect(context).to.include({ step: 1, shard: 1, signal: 'SIGSEGV', worker: 'a' });
    expect(table.faults).to.deep.equal(['WORKER_LOST', 'WORKER_LOST']);
    expect(table.state.shown.faults[0]!.error.message).to.contain('by SIGSEGV');
  });

  it('is told from other work, and forgiven by its success', () => {
    const table = new Table({ parallelism: 2 }, ['a', 'b'], { maxReplans: 10 });
    for (const shard of [0, 1, 0, 1]) die(table, table.added.findLast((job) => job.name === 'shard' && (job.data as { shard: number }).shard === shard)!, 'b');
    expect(table.state.kills.length).to.equal(4);
    table.completeReduce();
    expect(table.state.kills).to.deep.equal([]);
    for (let time = 0; time < 2; time++) die(table, table.last('reduce'), 'a');
    expect(table.state.phase).to.equal('running');
  });

  it('of a local job is the step at hand: progress forgives it', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    const progress = (at: number): Table => {
      const { id, data } = table.last('steps');
      return table.tell({ type: 'progress', id, data: { worker: 'a', epoch: (data as { epoch: number }).epoch, report: report(at) } });
    };
    for (let at = 1; at <= 4; at++) die(progress(at), table.last('steps'), 'a', 'SIGKILL');
    expect(table.state.phase).to.equal('running');
    for (let time = 0; time < 2; time++) die(table, table.last('steps'), 'a', 'SIGKILL');
    expect(table.state.shown.error).to.include({ code: 'JOB_FATAL' });
    expect(table.state.shown.error!.message).to.contain('step 5 ended its worker 3 times');
  });

  it('of a checkpoint counts although the run computes on beside it', () => {
    const table = new Table({ parallelism: 1, checkpoint: { every: 2 } }, ['a'], { maxKills: 2 });
    const twoSteps = (): Table => table.completeSteps(2).copied();
    die(twoSteps(), table.last('checkpoint'), 'a');
    expect(table.last('steps').data).to.include({ fromStep: 0 });
    die(twoSteps(), table.last('checkpoint'), 'a');
    expect(table.state.shown.error!.message).to.contain('the checkpoint of step 2 ended its worker 2 times');
  });

  it('is remembered by the record, told once, and not from what another orchestrator had counted', () => {
    const table = new Table({ parallelism: 2 }, ['a', 'b']);
    die(table, table.last('reduce'), 'a');
    const recovered = (record: RunRecord): Table => {
      const after = new Table({ parallelism: 2 }, ['a', 'b'], {}, { epoch: table.state.epoch, command: 'run' });
      after.state = initialState(after.state.settings, { record, control: { epoch: table.state.epoch, command: 'run' }, counted: null, faults: null, checkpoints: [], logThrough: 0 });
      return after.tell({ type: 'workers', workers: table.workers }).tell({ type: 'ready' }).wait(1);
    };
    expect(recovered(recordOf(table.state)).state.kills.length).to.equal(1);
    expect(recovered({ ...recordOf(table.state), kills: [] }).state.kills.length, 'of an epoch that is over').to.equal(0);
    expect(recovered({ ...recordOf(table.state), phase: 'queued' }).state.kills.length, 'tried again').to.equal(0);
  });
});

describe('run machine: gradients that are not finite', () => {
  const skip = (table: Table, at: number): Table => {
    const { id, data } = table.last('steps');
    const bad = { ...report(at), skipped: true, nonFinite: 'model.layers.2.self_attn.q_proj.weight' };
    return table.tell({ type: 'progress', id, data: { worker: 'a', epoch: (data as { epoch: number }).epoch, report: bad } });
  };

  it('skip the step on record, and too many in a row end the run, naming step, layer and tensor', () => {
    const table = new Table({ parallelism: 1, maxNonFiniteSteps: 2 }, ['a']);
    skip(table, 1);
    expect(table.faults).to.deep.equal(['NON_FINITE']);
    expect(table.state).to.include({ phase: 'running', step: 1 });
    const { id } = table.last('steps');
    table.tell({ type: 'progress', id, data: { worker: 'a', epoch: 0, report: report(2) } });
    skip(skip(table, 3), 4);
    expect(table.state.phase).to.equal('failed');
    expect(table.state.shown.error).to.deep.include({ code: 'NON_FINITE', context: { step: 4, tensor: 'model.layers.2.self_attn.q_proj.weight', layer: 2 } });
  });
});

describe('run machine: the faults that the record keeps', () => {
  it('are the newest hundred, of which skipped steps are twenty at most, so that they push out nothing else', () => {
    const table = new Table({ parallelism: 1, steps: 150, maxNonFiniteSteps: 1_000 }, ['a'], { stepsPerJob: 1_000 });
    const { id } = table.last('steps');
    table.tell({ type: 'fault', what: 'a disk', error: { code: 'DISK_FULL', message: 'full', context: {} } });
    for (let at = 1; at <= 149; at++) table.tell({ type: 'progress', id, data: { worker: 'a', epoch: 0, report: { ...report(at), skipped: true } } });
    expect(table.faults).to.deep.equal(['DISK_FULL', ...Array.from({ length: 20 }, () => 'NON_FINITE')]);
    expect(table.state.shown.faults.slice(1).map(({ what }) => what)).to.deep.equal(Array.from({ length: 20 }, (_, index) => `step ${130 + index}`));
    expect(table.state.shown.faultCounts).to.deep.equal({ DISK_FULL: 1, NON_FINITE: 149 });
    for (let count = 0; count < 120; count++) table.tell({ type: 'fault', what: `${count}`, error: { code: 'REDIS_UNAVAILABLE', message: 'away', context: {} } });
    expect(table.state.shown.faults.map(({ what }) => what)).to.deep.equal(Array.from({ length: 100 }, (_, index) => `${20 + index}`));
  });
});

describe('run machine: a Redis that was started anew', () => {
  it('makes what was under way void, by a new epoch, and plans it again; a pause stays one', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    const { epoch } = table.state;
    const old = table.last('steps');
    table.tell({ type: 'restarted' });
    expect(table.faults).to.deep.equal(['REDIS_LOST']);
    expect(table.state.epoch).to.equal(epoch + 1);
    expect(table.last('steps').id).not.to.equal(old.id);
    table.tell({ type: 'completed', id: old.id, result: {} });
    expect(table.counted).to.deep.equal([]);
    table.completeSteps(2).tell({ type: 'wish', wish: 'pause' });
    table.tell({ type: 'restarted' });
    expect(table.state.phase).to.be.oneOf(['pausing', 'paused']);
    expect(table.effects.flatMap((effect) => (effect.type === 'control' ? [effect.control] : [])).at(-1)!.epoch).to.equal(table.state.epoch);
  });

  it('a claim that it forgot is made again before any job is added', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    table.workers = [worker('a')];
    const before = table.effects.length;
    table.tell({ type: 'workers', workers: table.workers }).tell({ type: 'restarted' });
    const after = table.effects.slice(before).map(({ type }) => type);
    expect(after.indexOf('claim')).to.be.above(-1).and.to.be.below(after.indexOf('add'));
  });
});

describe('run machine: silence', () => {
  it('a job unheard of is looked up; a long silence is recorded once, and waited through', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    table.wait(200);
    expect(table.effects.some((effect) => effect.type === 'lookup')).to.equal(false);
    table.wait(200);
    expect(table.effects.at(-1)).to.deep.equal({ type: 'lookup', jobs: [{ queue: 'train', worker: 'a', id: table.last('steps').id }] });
    table.wait(2_000).wait(2_000);
    expect(table.faults).to.deep.equal(['TIMEOUT']);
    expect(table.state.phase).to.equal('running');
  });

  it('a job that Redis lost is planned again', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    const { id } = table.last('steps');
    table.tell({ type: 'missing', id });
    expect(table.last('steps').id).not.to.equal(id);
  });

  it('no worker is recorded once, with the reason', () => {
    const table = new Table({ parallelism: 1 }, []);
    table.wait(3_000).wait(3_000);
    expect(table.faults).to.deep.equal(['NO_WORKER']);
    expect(table.state.way!.reason).to.equal('waiting: no live worker');
  });

  it('a run that is over hears nothing any more', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    const job = table.last('steps');
    table.tell({ type: 'wish', wish: 'cancel' });
    const { length } = table.effects;
    table.wait(5_000).fail(job, 'TIMEOUT').tell({ type: 'wish', wish: 'resume' });
    expect(table.state.phase).to.equal('cancelled');
    expect(table.effects.length).to.equal(length);
  });
});

describe('run machine: the log of reduced gradients', () => {
  it('is bounded: a checkpoint is brought forward, and what it covers is deleted', () => {
    const table = new Table({}, ['a', 'b'], { logSteps: 2 });
    table.completeReduce().completeReduce();
    const { id, data } = table.last('checkpoint');
    expect(data).to.include({ step: 2 });
    const { epoch, directory } = data as { epoch: number; directory: string };
    table.tell({ type: 'completed', id, result: { worker: 'a', epoch, step: 2, directory, bytes: 1, milliseconds: 1 } });
    expect(table.effects).to.deep.include({ type: 'trim', from: 0, through: 2 });
    expect(table.last('reduce').data).to.include({ step: 3 });
  });
});

describe('run machine: what was given up, and what others rest on', () => {
  it('a sum of an epoch that was given up does not count, though its step is the one at hand', () => {
    const table = new Table({}, ['a', 'b']);
    const old = table.last('reduce');
    table.workers = [table.workers[0]!, worker('b', { incarnation: 'b-2', heldBy: 'r' })];
    table.tell({ type: 'workers', workers: table.workers });
    expect(table.last('reduce').data).to.include({ step: 1, epoch: table.state.epoch });
    expect(table.last('reduce').id).not.to.equal(old.id);
    expect(table.completeReduce('a', old).counted).to.deep.equal([]);
    expect(table.completeReduce().counted).to.deep.equal([1]);
  });

  it('a checkpoint that is complete in the middle of a flow deletes nothing before its end', () => {
    const table = new Table({ checkpoint: { every: 2, keep: 1 } }, ['a', 'b']);
    const deletions = (): Effect[] => table.effects.filter(({ type }) => type === 'trim' || type === 'deleteCheckpoints');
    table.completeReduce().completeReduce().copied();
    expect(table.last('reduce').data).to.include({ step: 3 });
    expect(table.saved().state.checkpoints).to.have.length(1);
    expect(deletions()).to.deep.equal([]);
    table.completeReduce();
    expect(deletions()).to.deep.equal([{ type: 'trim', from: 0, through: 2 }]);
  });

  it('what is computed again, when home is lost while nothing is under way, has names of its own', () => {
    const table = new Table({ parallelism: 1, steps: 2 }, ['a', 'b']);
    const first = table.last('steps');
    table.completeSteps(2);
    for (let failures = 0; failures < 2; failures++) table.copied().fail(table.last('checkpoint'), 'TIMEOUT');
    expect(table.state).to.include({ activity: null, saving: null, epoch: 0 });
    table.workers = table.workers.filter(({ id }) => id !== first.worker);
    table.tell({ type: 'workers', workers: table.workers });
    expect(table.last('steps').data).to.include({ fromStep: 0, epoch: table.state.epoch });
    expect(table.state.epoch).to.be.above(0);
    expect(table.counted).to.deep.equal([1, 2]);
  });
});
