/**
 * The demo: one JSON object, a loss that falls on text it never saw, the same digest however many workers and whichever of
 * them is killed, and nothing left behind. Real processes and a real SIGKILL; few steps.
 */
import { existsSync, readFileSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { expect } from 'chai';
import { isAlive } from '../../cli/home-lock.ts';
import type { ProcessName } from '../../cli/home-lock.ts';
import { CheckpointReader } from '../../data/checkpoint-files.ts';
import { Workplace } from './cli-harness.ts';

interface Summary {
  readonly run: string;
  readonly steps: number;
  readonly firstLoss: number;
  readonly lastLoss: number;
  readonly validationLossBefore: number;
  readonly validationLoss: number;
  readonly tokensPerSecond: number;
  readonly checkpoint: string;
  readonly weightsDigest: string;
  readonly sample: string;
}

const KEYS = ['run', 'steps', 'firstLoss', 'lastLoss', 'validationLossBefore', 'validationLoss', 'tokensPerSecond', 'checkpoint', 'weightsDigest', 'sample'];

describe('cuda-nn demo', function () {
  this.timeout(240_000);
  const place = new Workplace();
  let alone: Summary;
  after(() => place.remove());

  const demos = (): string[] => (existsSync(place.at('.cuda-nn', 'demo')) ? readdirSync(place.at('.cuda-nn', 'demo')) : []);
  const run = async (...args: string[]): Promise<{ summary: Summary; stderr: string }> => {
    const { code, stdout, stderr } = await place.run(['demo', '--json', '--steps', '6', ...args], { env: { CUDA_NN_THREADS: '0' }, timeoutMs: 230_000 });
    expect(code, stderr).to.equal(0);
    expect(stdout).to.match(/^\{[^\n]*\}\n$/);
    return { summary: JSON.parse(stdout) as Summary, stderr };
  };

  it('ends with one JSON object and a checkpoint that opens', async () => {
    const { summary } = await run();
    alone = summary;
    expect(Object.keys(summary)).to.deep.equal(KEYS);
    expect(summary.steps).to.equal(6);
    expect(summary.validationLossBefore).to.be.closeTo(Math.log(4096), 0.2);
    expect(summary.validationLoss).to.be.below(summary.validationLossBefore - 0.3);
    expect(summary.lastLoss).to.be.below(summary.firstLoss);
    expect(summary.tokensPerSecond).to.be.above(0);
    expect(summary.sample.length).to.be.above(50);
    const reader = CheckpointReader.open(summary.checkpoint, { verify: true });
    expect(reader.model.vocabSize).to.equal(4096);
    expect(reader.tokenizer).not.to.equal(null);
    reader.close();
    expect(demos()).to.have.length(1);
    expect(readdirSync(place.at('.cuda-nn', 'demo', demos()[0]!)).sort()).to.deep.equal(['runs', 'spec.json', 'tokenizer.json', 'train.tokens', 'validation.tokens']);
  });

  it('gives the same bits with three workers, one of them killed', async () => {
    const { summary, stderr } = await run('--workers', '3', '--kill-worker-at', '2');
    expect(stderr).to.contain('SIGKILL to worker').and.to.contain('started again');
    expect(summary.weightsDigest).to.equal(alone.weightsDigest);
    expect(summary.validationLoss).to.equal(alone.validationLoss);
    expect(summary.sample).to.equal(alone.sample);
  });

  it('leaves nothing after Ctrl-C', async () => {
    const before = demos();
    const demo = place.start(['demo', '--steps', '1000'], { env: { CUDA_NN_THREADS: '0' } });
    await demo.saw('eval at step 0');
    const home = place.at('.cuda-nn', 'demo', demos().find((name) => !before.includes(name))!, 'home');
    const servers = JSON.parse(readFileSync(join(home, 'redis', 'processes.json'), 'utf8')) as ProcessName[];
    const workers = [...demo.stderr().matchAll(/worker .*\(process (\d+)\) on /g)].map((match) => Number(match[1]));
    expect(workers).to.have.length(1);
    demo.child.kill('SIGINT');
    expect((await demo.ended).code).to.equal(130);
    expect(servers.some(isAlive)).to.equal(false);
    expect(() => process.kill(workers[0]!, 0)).to.throw('ESRCH');
    expect(demos()).to.deep.equal(before);
  });
});
