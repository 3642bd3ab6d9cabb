/** Work that ends its worker's process: counted by the work, forgiven by its success, and fatal to the run in the end (orchestrator/kills.ts). */
import { expect } from 'chai';
import type { RunRecord } from '../../config/messages.ts';
import { initialState, recordOf } from '../../orchestrator/run-state.ts';
import type { NewJob } from '../../orchestrator/run-state.ts';
import { Table, worker } from '../support/machine-table.ts';

describe('run machine: work that ends its worker', () => {
  /** The worker dies with `job` in hand, and its successor tells how. */
  const die = (table: Table, job: NewJob, id: string, signal = 'SIGSEGV', stderr = 'moe.c:7: slot < slots'): Table => {
    const incarnation = `${id}-${++deaths}`;
    const error = { code: 'WORKER_LOST', message: 'lost', context: { stderr } } as const;
    table.workers = table.workers.map((each) => (each.id === id ? worker(id, { incarnation, heldBy: 'r', lastExit: { job: job.id, code: null, signal, error, atMs: 0 } }) : each));
    return table.see(...table.workers).wait(20);
  };
  let deaths = 1;

  it('fails the run the third time, with the evidence, whatever worker it was given to', () => {
    const table = new Table({ parallelism: 2 }, ['a', 'b']);
    for (const id of ['a', 'b', 'a']) {
      expect(table.state.phase).to.equal('running');
      die(table, table.shardJob(1), id);
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
    for (const shard of [0, 1, 0, 1]) die(table, table.shardJob(shard), 'b');
    expect(table.state.kills.length).to.equal(4);
    table.completeReduce();
    expect(table.state.kills).to.deep.equal([]);
    for (let time = 0; time < 2; time++) die(table, table.last('reduce'), 'a');
    expect(table.state.phase).to.equal('running');
  });

  it('of a local job is the step at hand: progress forgives it', () => {
    const table = new Table({ parallelism: 1 }, ['a']);
    for (let at = 1; at <= 4; at++) die(table.progress(at), table.last('steps'), 'a', 'SIGKILL');
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
