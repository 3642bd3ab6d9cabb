/** `retry`, `restore` and what `status` tells of a run's past, by the real command over a real Redis with a fake worker. */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect } from 'chai';
import type { RunRecord } from '../../config/messages.ts';
import type { Restored } from '../../orchestrator/client.ts';
import { FakeCluster } from '../support/fake-cluster.ts';
import { until } from '../support/wait.ts';
import { Workplace } from './cli-harness.ts';
import type { Outcome } from './cli-harness.ts';

describe('cli: the life of a run', function () {
  this.timeout(60_000);
  const place = new Workplace();
  let cluster: FakeCluster;
  let env: NodeJS.ProcessEnv;
  before(async () => {
    cluster = await FakeCluster.start();
    await cluster.orchestrate();
    await cluster.work('w1', { shardMs: 3 });
    const { redis, runs, home } = cluster.config;
    env = { CUDA_NN_REDIS_URL: redis.url, CUDA_NN_EXCHANGE_URL: redis.exchangeUrl, CUDA_NN_RUNS: runs, CUDA_NN_HOME: home };
  });
  after(async () => {
    await cluster.stop();
    place.remove();
  });

  const cli = (...args: string[]): Promise<Outcome> => place.run(args, { env });
  const expectNarrow = (text: string): void => {
    for (const line of text.split('\n')) expect(line.length, line).to.be.at.most(80);
  };

  it('retry tries a cancelled run again, once; status tells of both attempts', async () => {
    const run = await cluster.client.train(cluster.spec('twice', { steps: 60 }));
    await until('step 12', async () => (await run.record()).step >= 12);
    await run.pause(); // a command takes longer to start than the rest of this run
    expect(await cli('retry', 'twice')).to.include({ code: 3, stdout: '' });
    await run.cancel();
    await run.ended();
    expect(await cli('retry', 'twice')).to.deep.include({ code: 0 });
    await run.wait();
    const again = await cli('retry', 'twice');
    expect(again.code).to.equal(3);
    expect(again.stderr).to.match(/^cuda-nn: RUN_STATE: run twice is completed; only a run that failed or was cancelled can be tried again$/m);
    const { stdout } = await cli('status', 'twice');
    expect(stdout).to.match(/attempt 1 .* steps 0 to \d+, .*cancelled/).and.to.match(/attempt 2 .* steps \d+ to 60, .*completed/s);
    expectNarrow(stdout);
    const record = await place.json<RunRecord>(['status', 'twice'], { env });
    expect(record.attempts.map(({ number, phase }) => [number, phase])).to.deep.equal([[1, 'cancelled'], [2, 'completed']]);
  });

  it('restore brings back what an empty Redis does not know, a line for each, and ends with the code of what it refused', async () => {
    await cluster.redis.kill();
    cluster.redis.queues.empty();
    await cluster.redis.start();
    await until('an empty Redis', async () => (await cluster.client.runs()).length === 0);
    mkdirSync(join(cluster.config.runs, 'broken'));
    writeFileSync(join(cluster.config.runs, 'broken', 'spec.json'), '{');
    const { code, stdout, stderr } = await cli('restore');
    expect(code).to.equal(2);
    expect(stderr).to.match(/^cuda-nn: SPEC_INVALID: /m);
    expect(stdout).to.match(/^broken +SPEC_INVALID: /m).and.to.match(/^twice +completed at step 60 of 60; its record is back$/m);
    expectNarrow(stdout.split('\n').filter((line) => !line.includes('/')).join('\n'));
    const [kept] = await place.json<Restored[]>(['restore', 'twice'], { env });
    expect(kept).to.include({ run: 'twice', outcome: 'kept', phase: 'completed', step: 60 });
    expect((await cli('restore', 'nobody')).code).to.equal(3);
  });
});
