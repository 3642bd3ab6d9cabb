/**
 * The whole command line on one machine: `up`, a run followed, looked at, paused, resumed and cancelled, its checkpoint
 * evaluated and sampled, the examples, and a clean end. Real processes, a real Redis, the preset `tiny`.
 */
import { spawn } from 'node:child_process';
import { existsSync, readFileSync, readdirSync, writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { expect } from 'chai';
import { isAlive } from '../../cli/home-lock.ts';
import type { ProcessName } from '../../cli/home-lock.ts';
import type { RunEvent, RunRecord } from '../../config/messages.ts';
import { Workplace } from './cli-harness.ts';
import type { Outcome, Running } from './cli-harness.ts';

interface Evaluation {
  readonly loss: number;
  readonly targetTokens: number;
}

interface Generation {
  readonly method: string;
  readonly completions: readonly { readonly prompt: string; readonly text: string; readonly tokens: readonly number[] }[];
}

describe('cuda-nn up', function () {
  this.timeout(180_000);
  const place = new Workplace();
  let up: Running;

  before(async () => {
    await place.prepareData();
    up = place.start(['up', '--gpus', 'none', '--port', '0', '--json'], { timeoutMs: 170_000 });
    await up.saw('"dashboard"');
  });

  after(() => place.remove());

  /** Runs one of the examples against this `up`. */
  async function example(name: string, args: readonly string[]): Promise<Outcome> {
    const file = fileURLToPath(new URL(`../../examples/${name}.js`, import.meta.url));
    const child = spawn(process.execPath, [file, ...args], { cwd: place.directory, stdio: ['ignore', 'pipe', 'pipe'] });
    let stdout = '';
    let stderr = '';
    child.stdout.setEncoding('utf8').on('data', (text: string) => (stdout += text));
    child.stderr.setEncoding('utf8').on('data', (text: string) => (stderr += text));
    return new Promise((settle) => {
      child.once('close', (code) => settle({ code, stdout, stderr }));
    });
  }

  it('says where everything is, in one JSON object, with no password in it', async () => {
    const ready = JSON.parse(up.stdout()) as { dashboard: string; redis: string; workers: string[] };
    expect(ready.workers).to.have.length(1);
    expect(ready.redis).to.match(/^unix:.*password=\*\*\*$/);
    expect(up.stderr()).not.to.match(/password=[0-9a-f]/);
    const page = await fetch(ready.dashboard);
    expect(page.status).to.be.below(500);
  });

  it('is refused a second time in the same home', async () => {
    const { code, stderr } = await place.run(['up', '--gpus', 'none', '--port', '0']);
    expect(code).to.equal(3);
    expect(stderr).to.match(/^cuda-nn: ALREADY_UP: [^\n]*\n$/);
  });

  it('trains a run and follows it to its end', async () => {
    const { code, stdout, stderr } = await place.run(['train', place.writeSpec('first'), '--follow', '--json']);
    expect(stderr).to.contain('eval at step 6').and.to.contain('completed');
    expect(code).to.equal(0);
    const record = JSON.parse(stdout) as RunRecord;
    expect(record).to.deep.include({ run: 'first', phase: 'completed', step: 6, steps: 6 });
    expect(record.weightsDigest).to.match(/^[0-9a-f]{64}$/);
    expect(record.validation!.loss).to.be.below(record.validationBefore!);
  });

  it('lists runs, tells all of one, and prints its steps', async () => {
    const records = await place.json<RunRecord[]>(['runs']);
    expect(records.map(({ run }) => run)).to.include('first');
    const list = await place.run(['runs']);
    expect(list.stdout).to.match(/^RUN +PHASE +STEP/).and.to.match(/first +completed +6\/6/);
    for (const line of list.stdout.split('\n')) expect(line.length).to.be.at.most(80);
    const record = await place.json<RunRecord>(['status', 'first']);
    expect(record.phase).to.equal('completed');
    const text = await place.run(['status', 'first']);
    expect(text.stdout).to.contain(record.weightsDigest);
    const logs = await place.run(['logs', 'first', '--follow']);
    expect(logs.stdout.match(/^step \d+ loss/gm)).to.have.length(6);
    const lines = (await place.run(['logs', 'first', '--json'])).stdout.trim().split('\n').map((line) => JSON.parse(line) as { type: string });
    expect(lines.filter(({ type }) => type === 'step')).to.have.length(6);
  });

  it('refuses a second run of the same name', async () => {
    const { code, stderr } = await place.run(['train', 'first.json']);
    expect(code).to.equal(3);
    expect(stderr).to.match(/^cuda-nn: RUN_EXISTS: [^\n]*\n$/);
  });

  it('evaluates a checkpoint through the queue', async () => {
    const { checkpoint, validation } = await place.json<RunRecord>(['status', 'first']);
    const result = await place.json<Evaluation>(['eval', checkpoint!.directory, '--data', 'validation.tokens', '--sequences', '4', '--length', '32']);
    expect(result.loss).to.be.closeTo(validation!.loss, 1e-6);
    const text = await place.run(['eval', checkpoint!.directory, '--data', 'validation.tokens', '--sequences', '4']);
    expect(text.stdout).to.match(/^loss +\d\.\d{4} nats a token\nperplexity /);
  });

  it('generates text: greedy is one text, a seed is one text', async () => {
    const { checkpoint } = await place.json<RunRecord>(['status', 'first']);
    const generate = (...args: string[]) => place.json<Generation>(['generate', checkpoint!.directory, '--prompt', 'the whale', '--max-tokens', '8', ...args]);
    const greedy = await generate();
    expect(greedy.method).to.equal('greedy');
    expect(greedy.completions[0]!.tokens.length).to.be.within(1, 8);
    expect(await generate()).to.deep.include({ completions: greedy.completions });
    const sampled = await generate('--top-p', '0.9', '--temperature', '2', '--seed', '3');
    expect(sampled.method).to.equal('top-p');
    expect((await generate('--top-p', '0.9', '--temperature', '2', '--seed', '3')).completions).to.deep.equal(sampled.completions);
    writeFileSync(place.at('prompt.txt'), 'upon the sea');
    const plain = await place.run(['generate', checkpoint!.directory, '--prompt-file', 'prompt.txt', '--prompt', 'a ship', '--max-tokens', '4']);
    expect(plain.stdout).to.match(/^a ship/).and.to.contain('\nupon the sea');
  });

  it('pauses, resumes and cancels', async () => {
    await place.run(['train', place.writeSpec('long', { steps: 100_000, evaluation: { every: 0 }, checkpoint: { every: 0 } })]);
    const logs = place.start(['logs', 'long', '--follow', '--json']);
    await logs.saw('"step"');
    const phase = async (wanted: string): Promise<void> => {
      const deadline = performance.now() + 20_000;
      for (;;) {
        const record = await place.json<RunRecord>(['status', 'long']);
        if (record.phase === wanted) return;
        if (performance.now() > deadline) throw new Error(`still ${record.phase}, not ${wanted}`);
      }
    };
    expect((await place.run(['pause', 'long'])).code).to.equal(0);
    await phase('paused');
    expect((await place.run(['resume', 'long'])).code).to.equal(0);
    await phase('running');
    const follow = await place.run(['cancel', 'long']);
    expect(follow.code).to.equal(0);
    await phase('cancelled');
    const { code, stdout } = await logs.ended;
    expect(code).to.equal(0);
    const phases = stdout.trim().split('\n').map((line) => JSON.parse(line) as RunEvent).flatMap((event) => (event.type === 'phase' ? [event.phase] : []));
    expect(phases.at(-1)).to.equal('cancelled');
    expect(phases).to.include('paused');
    const again = await place.run(['pause', 'long']);
    expect(again.code).to.equal(3);
    expect(again.stderr).to.match(/^cuda-nn: RUN_STATE: [^\n]*\n$/);
  });

  it('a run that is cancelled while it is followed ends the command with 6', async () => {
    const train = place.start(['train', place.writeSpec('followed', { steps: 100_000 }), '--follow']);
    await train.saw('running');
    await place.run(['cancel', 'followed']);
    const { code, stderr } = await train.ended;
    expect(code).to.equal(6);
    expect(stderr.trimEnd().split('\n').at(-1)).to.match(/^cuda-nn: CANCELLED: /);
  });

  it('leaves a followed run going after Ctrl-C', async () => {
    const train = place.start(['train', place.writeSpec('left', { steps: 100_000 }), '--follow']);
    await train.saw('running');
    train.child.kill('SIGINT');
    expect((await train.ended).code).to.equal(130);
    const { phase } = await place.json<RunRecord>(['status', 'left']);
    expect(phase).to.equal('running');
    await place.run(['cancel', 'left']);
  });

  it('reads a spec from standard input', async () => {
    const spec = readFileSync(place.at(place.writeSpec('piped', { steps: 1 })), 'utf8');
    const { code, stdout } = await place.run(['train', '-', '--name', 'renamed'], { input: spec });
    expect(code).to.equal(0);
    expect(stdout).to.equal('renamed\n');
  });

  it('the examples do what they say', async () => {
    const enqueued = await example('enqueue-runs', [place.writeSpec('one', { steps: 2 }), place.writeSpec('two', { steps: 2 })]);
    expect(enqueued.stderr).to.equal('');
    expect(enqueued.stdout.trim().split('\n').map((line) => (JSON.parse(line) as RunRecord).phase)).to.deep.equal(['completed', 'completed']);
    const swept = await example('sweep-learning-rate', [place.writeSpec('sweep', { evaluation: { every: 3, sequences: 2 } }), '1e-3', '2e-3']);
    expect(swept.stdout).to.match(/^[12]e-3 +completed +\d\.\d{4}\n[12]e-3 +completed +\d\.\d{4}\n$/);
    await place.run(['train', place.writeSpec('watched', { steps: 9 })]);
    const waited = await example('wait-for-evals', ['watched', '--data', 'validation.tokens']);
    expect(waited.stdout).to.match(/step 9: validation loss/).and.to.match(/completed\ntest loss \d\.\d{4}\n$/);
    for (const name of ['enqueue-runs', 'sweep-learning-rate', 'wait-for-evals']) {
      const { code, stderr } = await example(name, []);
      expect(code).to.equal(2);
      expect(stderr).to.match(/^usage: /);
    }
  });

  it('a reader that closes the pipe early ends a command quietly', async () => {
    const logs = place.start(['logs', 'first', '--json']);
    logs.child.stdout!.destroy();
    const { code, stderr } = await logs.ended;
    expect(code).to.equal(0);
    expect(stderr).to.equal('');
  });

  it('stops cleanly on the first Ctrl-C', async () => {
    const servers = JSON.parse(readFileSync(place.at('.cuda-nn/redis/processes.json'), 'utf8')) as ProcessName[];
    up.child.kill('SIGINT');
    const { code } = await up.ended;
    expect(code).to.equal(0);
    expect(servers.some(isAlive)).to.equal(false);
    expect(readdirSync(place.at('.cuda-nn'))).to.deep.equal(['redis']);
    expect(existsSync(place.at('.cuda-nn/redis/queues.sock'))).to.equal(false);
  });

  it('then commands say that nothing is up, and eval and generate bring their own worker', async () => {
    const { code, stderr } = await place.run(['runs']);
    expect(code).to.equal(4);
    expect(stderr).to.match(/^cuda-nn: REDIS_UNAVAILABLE: [^\n]*cuda-nn up[^\n]*\n$/);
    const result = await place.json<Evaluation>(['eval', 'runs/first/checkpoints/step-6', '--data', 'validation.tokens', '--sequences', '4', '--length', '32']);
    expect(result.targetTokens).to.equal(128);
  });
});
