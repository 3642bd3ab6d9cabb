/**
 * What a checkpoint means to a run while it is written, when it is complete, and when it fails or cannot be read any more: the part of
 * orchestrator/run-machine.ts that has to do with them. When one is due is orchestrator-machine-decisions.test.ts's.
 */
import { expect } from 'chai';
import type { ErrorCode } from '../../config/errors.ts';
import type { RunSpecInput } from '../../config/run-spec.ts';
import { jobId } from '../../orchestrator/run-state.ts';
import type { JobAddress, NewJob, RunSettings } from '../../orchestrator/run-state.ts';
import { Table, hex, worker } from '../support/machine-table.ts';

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
    paused.wish('pause').completeSteps(0);
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
      (table, job) => table.see(...table.workers.filter(({ id }) => id !== job.worker)),
    ];
    for (const [index, end] of ends.entries()) {
      const table = begun({}, ['a', 'b']).copied();
      const { epoch } = table.state;
      const job = table.last('checkpoint');
      end(table, job);
      expect(table.state.saving).to.equal(null);
      expect(table.all('remove').flatMap(({ jobs }) => jobs.map(({ id }) => id))).to.include(job.id);
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

  it('is tried a second time at once, and a third time after a pause', () => {
    const table = begun({ steps: 3 }, ['a'], { backoffMs: 100, backoffMaximumMs: 1_000 }).copied();
    const written = (): number => table.added.filter(({ name }) => name === 'checkpoint').length;
    expect(table.fail(table.last('checkpoint'), 'TIMEOUT').added.filter(({ name }) => name === 'checkpoint').length).to.equal(2);
    table.copied().fail(table.last('checkpoint'), 'TIMEOUT').wait(99);
    expect(written()).to.equal(2);
    table.wait(1);
    expect(written()).to.equal(3);
    // One that is complete forgives those that failed.
    expect(table.copied().saved().state).to.include({ saveFailures: 0, replans: 0 });
  });

  it('that is complete forgives a failure of one that was not copied yet', () => {
    const table = begun({ steps: 3 }, ['a'], { maxReplans: 1 });
    table.fail(table.last('checkpoint'), 'TIMEOUT').saved().fail(table.last('digest'), 'TIMEOUT');
    expect(table.state.phase).to.equal('running');
  });

  it('that no attempt cures fails the run', () => {
    const table = begun().copied();
    expect(table.fail(table.last('checkpoint'), 'DEVICE_MEMORY').state.shown.error).to.have.property('code', 'DEVICE_MEMORY');
  });

  it('is looked up when nothing is heard of it, as often as a job under way', () => {
    const table = begun().copied();
    const { id } = table.last('checkpoint');
    const lookups = (): number => table.all('lookup').filter(({ jobs }) => jobs.some((job) => job.id === id)).length;
    expect(table.wait(299).all('lookup')).to.deep.equal([]);
    for (const [milliseconds, count] of [[1, 1], [299, 1], [1, 2]] as const) {
      table.wait(milliseconds);
      expect(lookups()).to.equal(count);
    }
  });

  it('that tells of another step than its own fails the run', () => {
    const copied = begun();
    const job = copied.last('checkpoint');
    const other = { ...job, data: { ...job.data, step: 4 } };
    expect(copied.copied(other).state.shown.error).to.have.property('code', 'MESSAGE_INVALID');
    expect(begun().saved(other).state.shown.error).to.have.property('code', 'MESSAGE_INVALID');
    expect(begun().copied().saved(other).state.shown.error).to.have.property('code', 'MESSAGE_INVALID');
  });

  it('is void when Redis was started anew: its job is removed, and one of another id is begun', () => {
    const table = begun({ steps: 3 }).copied();
    const { id } = table.last('checkpoint');
    table.tell({ type: 'restarted' });
    expect(table.state.saving).to.equal(null);
    expect(table.all('remove').flatMap(({ jobs }) => jobs.map((job) => job.id))).to.deep.equal([id]);
    expect(table.last('checkpoint').id).not.to.equal(id);
    expect(table.last('checkpoint').data).to.include({ step: 3 });
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
    table.wish('resume');
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
    // The version is not written yet, so nobody goes on before it is.
    expect(table.state.activity).to.equal(null);
    table.saved();
    expect(table.last('checkpoint').data).to.include({ step: 3 });
    expect(table.last('checkpoint').worker).not.to.equal(by);
    expect(table.state.checkpoints).to.deep.equal([]);
    expect(table.effects).to.deep.include({ type: 'deleteCheckpoints', directories: ['c/step-3'] });
  });

  it('is not kept when nobody can say which replica is right', () => {
    const table = begun({ compareDigestsEvery: 3 }, ['a', 'b']).copied();
    for (const [index, job] of table.added.filter((each) => each.name === 'digest').entries()) table.completeDigest(job, hex(String(index)));
    expect(table.state.saving).to.include({ unwanted: true });
    expect(table.state).to.include({ version: 0, epoch: 1 });
    table.saved();
    expect(table.state.checkpoints).to.deep.equal([]);
  });

  it('saves computing its steps again when the run had fallen back behind it', () => {
    const table = new Table({ parallelism: 1, checkpoint: { every: 3 } }, ['a', 'b']);
    table.completeSteps(3).copied();
    const checkpoint = table.last('checkpoint');
    table.workers = table.workers.map((each) => (each.id === 'a' ? { ...each, state: 'draining' } : each));
    table.see(...table.workers).completeSteps(1);
    // The way leads to b, but the version is only with a: what is being written is waited for, and then a's newest is written.
    expect(table.state).to.include({ version: 4, activity: null });
    table.state = { ...table.state, home: null };
    table.wait(1);
    expect(table.last('steps')).to.include({ worker: 'b' });
    expect(table.last('steps').data).to.include({ fromStep: 0 });
    table.progress(1).saved(checkpoint).fail(table.last('steps'), 'TIMEOUT');
    expect(table.state.home).to.equal(null);
    expect(table.last('steps').data).to.deep.include({ fromStep: 3, checkpoint: { directory: 'c/step-3', step: 3 } });
  });

  it('is taken up by the next orchestrator as what it is', () => {
    const job: JobAddress = { queue: 'train', worker: 'a', id: jobId('r', 0, 'checkpoint', 3, 2) };
    const spec = begun().state.settings.spec;
    const data = { run: 'r', epoch: 0, checkpoint: null, spec, step: 3, directory: 'c/step-3' };
    const adopt = (epoch: number, progress: unknown, startedAtMs = 0): Table => {
      const table = new Table({ parallelism: 1, checkpoint: { every: 3 } }, ['a'], {}, { epoch, command: 'run' }, 3);
      table.workers = [worker('a', { heldBy: 'r', startedAtMs, replica: { run: 'r', step: 3 } })];
      return table.see(...table.workers).adopt({ ...job, data }, { progress }).tell({ type: 'ready' });
    };
    const copied = { worker: 'a', epoch: 0, step: 3, copied: true };
    expect(adopt(0, null).state).to.deep.include({ saving: null }).and.to.have.nested.property('activity.kind', 'checkpoint');
    for (const epoch of [0, 4]) {
      const table = adopt(epoch, copied);
      expect(table.state.saving).to.include({ step: 3 });
      expect(table.last('steps').data).to.include({ fromStep: 3 });
    }
    // One that an epoch before began and had not copied is not waited for: it is begun again, under another id.
    const again = adopt(4, null);
    expect(again.state.saving).to.equal(null);
    expect(again.last('checkpoint').id).to.equal(jobId('r', 4, 'checkpoint', 3, 3));
    const dead = adopt(0, copied, 7);
    expect(dead.state.saving).to.equal(null);
    expect(dead.faults).to.deep.equal(['WORKER_LOST']);
  });

  it('is not taken up of a step that did not count, nor when the run has a newer one', () => {
    const adopt = (steps: readonly number[], counted: number, known: number | null): Table => {
      const checkpoints = known === null ? [] : [{ directory: `c/step-${known}`, step: known }];
      const table = new Table({ parallelism: 1 }, ['a'], {}, { epoch: 0, command: 'run' }, counted, { checkpoints }).see(worker('a', { heldBy: 'r' }));
      const { spec } = table.state.settings;
      for (const step of steps) {
        const data = { run: 'r', epoch: 0, checkpoint: null, spec, step, directory: `c/step-${step}` };
        table.adopt({ queue: 'train', worker: 'a', id: jobId('r', 0, 'checkpoint', step, 0), data }, { progress: { worker: 'a', epoch: 0, step, copied: true } });
      }
      return table;
    };
    expect(adopt([5], 5, 3).state.saving).to.include({ step: 5 });
    expect(adopt([5], 4, 3).state.saving).to.equal(null);
    expect(adopt([5], 6, 5).state.saving).to.equal(null);
    expect(adopt([5, 4], 6, null).state.saving).to.include({ step: 5 });
  });
});

describe('run machine: checkpoints that cannot be read', () => {
  const failing = (code: ErrorCode, path: string, initialCheckpoint?: string): Table => {
    const table = new Table({ parallelism: 1, ...(initialCheckpoint === undefined ? {} : { initialCheckpoint }) }, ['a']);
    return table.fail(table.last('steps'), code, { path });
  };

  it('a damaged checkpoint is named and the one before used', () => {
    const table = new Table({ parallelism: 1, checkpoint: { every: 3 } }, ['a']);
    table.completeSteps(3).saved().completeSteps(3).saved();
    table.fail(table.last('steps'), 'CHECKPOINT_INVALID');
    expect(table.effects.at(-1)).to.deep.equal({ type: 'findCheckpoints' });
    const bad = { directory: 'c/step-6', error: { code: 'CHECKPOINT_INVALID', message: 'damaged', context: {} } } as const;
    table.tell({ type: 'checkpoints', good: [{ directory: 'c/step-3', step: 3 }], bad: [bad] });
    expect(table.last('steps').data).to.deep.include({ fromStep: 3, checkpoint: { directory: 'c/step-3', step: 3 } });
    expect(table.state.step).to.equal(6);
    expect(table.state.shown.faults.map((fault) => fault.what)).to.include('checkpoint c/step-6');
  });

  it('a search brings what the run has counted, and an answer that nobody waits for changes nothing', () => {
    const table = new Table({ parallelism: 1, checkpoint: { every: 3 } }, ['a']).completeSteps(3).saved();
    const places = [{ directory: 'c/step-3', step: 3 }, { directory: 'c/step-6', step: 6 }];
    table.tell({ type: 'checkpoints', good: [], bad: [] });
    expect(table.state.checkpoints).to.deep.equal(places.slice(0, 1));
    table.fail(table.last('steps'), 'CHECKPOINT_INVALID').tell({ type: 'checkpoints', good: places, bad: [] });
    expect(table.state.checkpoints).to.deep.equal(places.slice(0, 1));
    expect(table.last('steps').data).to.include({ fromStep: 3 });
  });

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
