/** Chaos itself, for half a minute and with short times: it disturbs, it proves, it chooses by its seed, and it leaves nothing behind. */
import { spawn } from 'node:child_process';
import { existsSync, readFileSync, readdirSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect } from 'chai';
import { isAlive } from '../../cli/home-lock.ts';
import type { ProcessName } from '../../cli/home-lock.ts';
import { chaos, recoveries } from '../chaos/chaos.ts';
import { KINDS, choose } from '../chaos/faults.ts';
import { Place } from '../chaos/place.ts';
import { reportOf, textOf } from '../chaos/report.ts';
import { generator } from '../sim/faults.ts';
import { QUICK } from '../support/stack.ts';
import { until } from '../support/wait.ts';

describe('chaos', function () {
  this.timeout(240_000);
  const times = { deadAfterMs: 5_000, lockDurationMs: 30_000 };

  it('chooses the same faults for the same seed, and every kind in time', () => {
    const faultsOf = (seed: number, count: number) => {
      const random = generator(seed);
      return Array.from({ length: count }, () => choose(random, times));
    };
    expect(faultsOf(7, 50)).to.deep.equal(faultsOf(7, 50));
    expect(faultsOf(7, 50)).to.not.deep.equal(faultsOf(8, 50));
    expect(new Set(faultsOf(1, 1_000).map(({ kind }) => kind)).size).to.equal(KINDS.length);
    for (const { lastsMs, pauseMs } of faultsOf(2, 500)) expect([lastsMs, pauseMs].every((each) => each > 0 && each < 1.5 * times.lockDurationMs)).to.equal(true);
  });

  it('measures recovery from where the run could go on', () => {
    const fault = (kind: (typeof KINDS)[number]) => ({ kind, what: '', beganMs: 100, endedMs: 200 });
    expect(recoveries([fault('worker stopped'), fault('Redis killed')], [90, 150, 230])).to.deep.equal([
      { kind: 'worker stopped', milliseconds: 50 }, { kind: 'Redis killed', milliseconds: 30 },
    ]);
    expect(recoveries([fault('Redis killed')], [150])[0]!.milliseconds).to.equal(null);
  });

  it('for half a minute: every run ends with the weights of the undisturbed one', async () => {
    const seed = Number(process.env['NN_CHAOS_SEED'] ?? 11);
    const messages: string[] = [];
    const options = { minutes: 0.5, seed, workers: 2, steps: 80, settings: QUICK, log: (message: string) => void messages.push(message), signal: new AbortController().signal };
    const report = reportOf(await chaos(options).catch((error: unknown) => {
      throw new Error(`seed ${seed}: ${(error as Error).message}\n${messages.join('\n')}`, { cause: error });
    }));
    expect(textOf(report)).to.contain('history     clean').and.to.match(/\npassed\n$/);
    expect(report.faults).to.be.above(3);
    expect(report.digestsEqual).to.equal(report.runs);
    expect(report.steps).to.equal(80 * report.runs);
  });

  const chaosDirectories = (pid: number): string[] => readdirSync(tmpdir()).filter((name) => name.startsWith(`nn-chaos-${pid}-`)).map((name) => join(tmpdir(), name));
  const processesOf = (directory: string): ProcessName[] =>
    readFileSync(join(directory, 'processes.jsonl'), 'utf8').split('\n').slice(0, -1).map((line) => JSON.parse(line) as ProcessName);
  /** The command line, when all its processes have started and it trains the undisturbed run. */
  const begun = async (): Promise<{ child: ReturnType<typeof spawn>; directory: string; ended: Promise<number | null> }> => {
    const main = fileURLToPath(new URL('../chaos/main.js', import.meta.url));
    const child = spawn(process.execPath, [main, '--minutes', '5', '--steps', '100000'], { stdio: 'ignore' });
    const ended = new Promise<number | null>((resolve) => child.once('exit', resolve));
    await until('its processes', () => chaosDirectories(child.pid!).some((directory) => existsSync(join(directory, 'runs', 'reference', 'metrics.jsonl'))), 60_000, 50);
    return { child, directory: chaosDirectories(child.pid!)[0]!, ended };
  };

  it('ends on Ctrl-C with nothing left of it', async () => {
    const { child, directory, ended } = await begun();
    const processes = processesOf(directory);
    expect(processes.length).to.be.above(6);
    child.kill('SIGINT');
    expect(await ended).to.equal(130);
    expect(existsSync(directory)).to.equal(false);
    expect(processes.filter(isAlive)).to.deep.equal([]);
  });

  it('cleans up after one that was killed', async () => {
    const { child, directory, ended } = await begun();
    child.kill('SIGKILL');
    await ended;
    const processes = processesOf(directory);
    Place.make(() => undefined).remove();
    expect(existsSync(directory)).to.equal(false);
    await until('the last process', () => processes.every((each) => !isAlive(each)));
  });
});
