/** Work that ends its worker's process: counted by the work, forgiven by its success, and fatal to the run in the end (orchestrator/kills.ts). */
import { expect } from 'chai';
import type { RunRecord } from '../../config/messages.ts';
import { forgive } from '../../orchestrator/kills.ts';
import { initialState, recordOf } from '../../orchestrator/run-state.ts';
import type { NewJob } from '../../orchestrator/run-state.ts';
import { Table, worker } from '../support/machine-table.ts';

describe('run machine: work that ends its worker', () => {
  /** The worker dies with `job` in hand, and its successor tells how. */
  const die = (table: Table, job: NewJob, id: string, signal: NodeJS.Signals | null = 'SIGSEGV', stderr = 'moe.c:7: slot < slots'): Table => {
    const incarnation = `${id}-${++deaths}`;
    const error = { code: 'WORKER_LOST', message: 'lost', context: { stderr } } as const;
    const lastExit = { job: job.id, code: signal === null ? 134 : null, signal, error, atMs: 0 };
    return table.see(...table.workers.map((each) => (each.id === id ? worker(id, { incarnation, heldBy: 'r', lastExit }) : each))).wait(20);
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
    expect(table.state.kills.map(({ name, step }) => [name, step])).to.deep.equal([['steps', 5]]);
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

  it('is remembered until that work is done; that of another run is not its own', () => {
    const table = new Table({ parallelism: 2, data: { train: 't', validation: 'v' }, evaluation: { every: 2 }, compareDigestsEvery: 1 }, ['a', 'b'], { maxKills: 2 });
    const names = (): string[] => table.state.kills.map(({ name, step }) => `${name} ${step}`);
    die(table, table.last('eval'), 'a');
    expect(names()).to.deep.equal(['eval 0']);
    table.completeEval(1);
    expect(names()).to.deep.equal([]);
    die(table, table.last('reduce'), 'a');
    die(table, table.shardJob(0), 'b');
    expect(names()).to.deep.equal(['reduce 1', 'shard 1']);
    table.completeReduce();
    expect(names()).to.deep.equal([]);
    die(table, table.last('digest'), 'b');
    expect(names()).to.deep.equal(['digest 1']);
    for (const job of table.added.filter(({ name }) => name === 'digest').slice(-2)) table.completeDigest(job, 'd'.repeat(32));
    expect(names()).to.deep.equal([]);
    die(table, { ...table.last('reduce'), id: 'other.0.reduce.2.0' }, 'a');
    expect(names()).to.deep.equal([]);
  });

  it('of one step is other work than that of another, also when the run has to go back', () => {
    const table = new Table({ parallelism: 2 }, ['a', 'b'], { maxKills: 2, maxReplans: 9 }).completeReduce().completeReduce();
    die(table, table.shardJob(0), 'a');
    for (let loss = 0; loss < 2; loss++) table.fail(table.last('reduce'), 'GRADIENT_LOST').wait(20);
    expect(table.last('reduce').data).to.include({ step: 1 });
    die(table, table.shardJob(0), 'b');
    expect(table.state.kills.map(({ name, step }) => [name, step])).to.deep.equal([['shard', 3], ['shard', 1]]);
    expect(table.state.phase).to.equal('running');
    // Step 1 had counted before: its second computation is no new step, and forgives nothing.
    table.completeReduce().completeReduce();
    expect(table.state.kills.length).to.equal(2);
    expect(table.completeReduce().state.kills).to.deep.equal([]);
  });

  it('of later work stays, of work of another kind too', () => {
    const table = new Table({ parallelism: 2 }, ['a', 'b'], { maxReplans: 9 });
    die(table, table.shardJob(0), 'a');
    const [kill] = table.state.kills;
    const kills = [kill!, { ...kill!, step: 2 }, { ...kill!, step: 3 }, { ...kill!, name: 'eval' as const }];
    expect(forgive(kills, ['shard', 'reduce'], 2).map(({ name, step }) => [name, step])).to.deep.equal([['shard', 3], ['eval', 1]]);
  });

  it('is heard once of each process, of the newest few hundred', () => {
    const table = new Table({ parallelism: 1 }, ['a'], { maxKills: 1_000, maxReplans: 1_000 });
    for (let time = 0; time < 300; time++) die(table, table.last('steps'), 'a');
    expect(table.see(...table.workers).state.kills.length).to.equal(300);
    expect(table.state.toldBy.length).to.equal(256);
  });

  it('of a checkpoint is forgiven when one is complete', () => {
    const table = new Table({ parallelism: 1, checkpoint: { every: 2 } }, ['a'], { maxKills: 3 }).completeSteps(2);
    die(table, table.last('checkpoint'), 'a');
    expect(table.state.kills.length).to.equal(1);
    expect(table.completeSteps(2).saved().state.kills).to.deep.equal([]);
  });

  it('fails with the last line that the process wrote, not too much of it, and its exit code where no signal ended it', () => {
    const table = new Table({ parallelism: 1 }, ['a'], { maxKills: 2 });
    die(table, table.last('steps'), 'a', null, 'first');
    die(table, table.last('steps'), 'a', null, `early\n${'x'.repeat(300)}\n`);
    const { message, context } = table.state.shown.error!;
    expect(message).to.contain('(a by exit code 134, a by exit code 134)').and.contain(`last: ${'x'.repeat(200)};`).and.not.contain('early');
    expect(context).to.include({ exitCode: 134, signal: null });
    expect(table.state.shown.faults[0]!.error.message).to.contain('with exit code 134');
  });
});
