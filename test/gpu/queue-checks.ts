/**
 * Training through the queue on a GPU, as a user does it: `cuda-nn up`, `tokenizer train`, `data prepare`, `train`, on the text of the
 * demo. The same run is undisturbed, loses its worker to SIGKILL, and has its GPU broken by a kernel that writes where it must not:
 * the same digest each time. Then 6.9b on one GPU. Without a GPU the same with preset tiny on a CPU that says it is broken, but for 6.9b, so
 * that these checks themselves cannot rot. Called by long.ts and test/system/gpu-rehearsal.test.ts.
 */
import { execFileSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { RunRecord } from '../../config/messages.ts';
import type { RunSpecInput } from '../../config/run-spec.ts';
import { demoText } from '../../data/book.ts';
import { presentBranch } from '../../orchestrator/metrics.ts';
import type { RunLine } from '../../orchestrator/metrics.ts';
import { packageWithLibrary } from '../support/fake-gpu.ts';
import { buildFaultyLibrary } from '../support/faulty-library.ts';
import { Workplace } from '../system/cli-harness.ts';
import type { Running } from '../system/cli-harness.ts';

/** One thing to show: `run` returns what to say of it, and throws where it does not hold. `out`: a directory for logs. */
export interface Check {
  readonly name: string;
  readonly run: (out: string) => string | Promise<string>;
}

const UP_LIMIT_MS = 560_000;
/** Milliseconds between looks at a run. */
const LOOK_MS = 150;

const pause = (milliseconds: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** Services that are up in a directory of their own, on a copy of the package where the CUDA library is another. */
class Site {
  readonly place: Workplace;
  #up: Running | undefined;

  constructor(main?: string) {
    this.place = new Workplace(main);
  }

  async start(gpus: string, env: NodeJS.ProcessEnv = {}): Promise<void> {
    this.#up = this.place.start(['up', '--gpus', gpus, '--port', '0', '--json'], { timeoutMs: UP_LIMIT_MS, env });
    await this.#up.saw('"dashboard"');
  }

  /** What `up` has said of its workers. */
  get said(): string {
    return this.#up?.stderr() ?? '';
  }

  /** Process id of the worker that was started last. */
  get workerPid(): number {
    const all = [...this.said.matchAll(/worker +\S+ \(process (\d+)\) on /g)];
    if (all.length === 0) throw new Error(`no worker was ready: ${this.said.slice(-400)}`);
    return Number(all.at(-1)![1]);
  }

  status(run: string): Promise<RunRecord> {
    return this.place.json<RunRecord>(['status', run]);
  }

  /** Looks at the run until `enough` says so; throws when it ends before or the limit passes. */
  async until(run: string, enough: (record: RunRecord) => boolean, limitSeconds: number): Promise<RunRecord> {
    const deadline = Date.now() + limitSeconds * 1000;
    for (;;) {
      const record = await this.status(run);
      if (enough(record)) return record;
      if (['completed', 'failed', 'cancelled'].includes(record.phase)) throw new Error(`run ${run} is ${record.phase} at step ${record.step}: ${record.error?.message ?? ''}`);
      if (Date.now() > deadline) throw new Error(`run ${run} is at step ${record.step} of ${record.steps} after ${limitSeconds} s`);
      await pause(LOOK_MS);
    }
  }

  async prepareText(vocabSize: number): Promise<void> {
    await this.place.json(['tokenizer', 'train', demoText(), '--vocab-size', String(vocabSize), '--output', 'tokenizer.json']);
    await this.place.json(['data', 'prepare', demoText(), '--tokenizer', 'tokenizer.json', '--output', 'train.tokens', '--validation', 'validation.tokens', '--hold-out', '0.1']);
  }

  async stop(): Promise<void> {
    this.#up?.child.kill('SIGTERM');
    await this.#up?.ended;
    this.place.remove();
  }
}

/** Loss of each step, from the run's metrics. */
const lossesOf = (site: Site, run: string): number[] => {
  const lines = readFileSync(site.place.at('cuda-nn-runs', run, 'metrics.jsonl'), 'utf8').trim().split('\n');
  return presentBranch(lines.map((line) => JSON.parse(line) as RunLine), []).steps.map(({ loss }) => loss ?? Number.NaN);
};

const mean = (values: readonly number[]): number => values.reduce((sum, value) => sum + value, 0) / values.length;

/** The checks in their order: the later ones compare with what the earlier ones found. */
export function queueChecks({ gpu }: { readonly gpu: boolean }): Check[] {
  const [gpus, preset, vocabSize, steps] = gpu ? (['0', 'demo', 4096, 1600] as const) : (['none', 'tiny', 512, 160] as const);
  const spec = (precision: 'fp32' | 'bf16'): Partial<RunSpecInput> => ({
    model: preset, precision, steps, seed: 7, batch: { shards: 2, sequences: 4, sequenceLength: gpu ? 256 : 64 },
    optimizer: { learningRate: 1e-3, warmupSteps: 20 }, evaluation: { every: steps / 4, sequences: 8 }, checkpoint: { every: steps / 8, keep: 2 },
  });
  const best = gpu ? 'bf16' : 'fp32';
  let site: Site | undefined;
  let digest: string | null = null;
  const here = async (): Promise<Site> => {
    if (site !== undefined) return site;
    site = new Site();
    await site.prepareText(vocabSize);
    await site.start(gpus, { CUDA_NN_RUNS: 'cuda-nn-runs' });
    return site;
  };
  const finish = async (on: Site, name: string, limitSeconds: number): Promise<RunRecord> => on.until(name, ({ phase }) => phase === 'completed', limitSeconds);
  const launch = async (on: Site, name: string, precision: 'fp32' | 'bf16'): Promise<void> => {
    await on.place.json(['train', on.place.writeSpec(name, spec(precision))]);
  };
  const checks: Check[] = [
    ...(gpu ? (['fp32', 'bf16'] as const) : (['fp32'] as const)).map((precision): Check => ({
      name: `${preset} in ${precision} on the demo's text: the loss falls`,
      run: async () => {
        const on = await here();
        await launch(on, `alone-${precision}`, precision);
        const record = await finish(on, `alone-${precision}`, 150);
        if (!(record.validation!.loss < record.validationBefore! - 0.5)) throw new Error(`validation loss ${record.validationBefore} -> ${record.validation!.loss}`);
        const losses = lossesOf(on, `alone-${precision}`);
        if (losses.length !== steps || !(mean(losses.slice(-10)) < mean(losses.slice(0, 10)) - 0.5)) throw new Error(`${losses.length} losses, ${losses.at(0)} -> ${losses.at(-1)}`);
        if (precision === best) digest = record.weightsDigest;
        const fall = `${record.validationBefore!.toFixed(3)} -> ${record.validation!.loss.toFixed(3)}`;
        return `validation loss ${fall}, ${Math.round(record.tokensPerSecond!)} tokens/s, digest ${record.weightsDigest!.slice(0, 16)}`;
      },
    })),
    {
      name: `${preset} in ${best}, its worker killed in mid-run: the same bits`,
      run: async () => {
        const on = await here();
        await launch(on, 'killed', best);
        const { step } = await on.until('killed', (record) => record.step > steps / 5 && record.phase === 'running', 120);
        const pid = on.workerPid;
        process.kill(pid, 'SIGKILL');
        const record = await finish(on, 'killed', 150);
        if (on.workerPid === pid) throw new Error('the worker was not started again');
        if (digest === null || record.weightsDigest !== digest) throw new Error(`digest ${record.weightsDigest}, undisturbed ${digest}`);
        return `killed at step ${step} of ${steps}, ${record.faults.length} fault(s) in its record, digest ${record.weightsDigest.slice(0, 16)}`;
      },
    },
  ];
  checks.push({
    name: `${preset} in ${best}, ${gpu ? "its GPU's context broken by a kernel" : 'its device broken'}: the worker reports, is restarted, and the run has the same bits`,
    run: async (out) => {
      const scratch = mkdtempSync(join(out === '' ? tmpdir() : out, 'faulty-'));
      const name = gpu ? 'cuda' : 'cpu';
      const on = new Site(packageWithLibrary(join(scratch, 'package'), buildFaultyLibrary(scratch, name), name));
      try {
        await on.prepareText(vocabSize);
        const mark = join(scratch, 'broken');
        await on.start(gpus, { CUDA_NN_RUNS: 'cuda-nn-runs', FAULT_AT: String(steps), FAULT_MARK: mark });
        await launch(on, 'faulty', best);
        const record = await finish(on, 'faulty', 200);
        if (!existsSync(mark)) throw new Error('the device was not broken');
        const told = /ended, (DEVICE_FAULT: [^\n]*); started again/.exec(on.said)?.[1];
        if (told === undefined) throw new Error(`no worker reported a fault: ${on.said.slice(-600)}`);
        if (digest === null || record.weightsDigest !== digest) throw new Error(`digest ${record.weightsDigest}, undisturbed ${digest}`);
        return `${told}; ${record.faults.length} fault(s) in its record, digest ${record.weightsDigest.slice(0, 16)}`;
      } finally {
        await on.stop();
        rmSync(scratch, { recursive: true, force: true });
      }
    },
  });
  if (gpu) {
    checks.push(
      {
        name: '6.9b at sequence 4096 on the demo’s text: the loss falls, memory stays',
        run: async () => {
          const on = await here();
          const big = {
            model: '6.9b', precision: 'bf16', recompute: 'layer', steps: 24, seed: 7, batch: { shards: 1, microBatches: 4, sequences: 2, sequenceLength: 4096 },
            optimizer: { learningRate: 6e-4, warmupSteps: 8 }, evaluation: { every: 0, sequences: 4 }, checkpoint: { every: 0, keep: 1 },
          } as const;
          await on.place.json(['train', on.place.writeSpec('big', big)]);
          const used: { step: number; megabytes: number }[] = [];
          await on.until('big', ({ step, phase }) => {
            const megabytes = Number(execFileSync('nvidia-smi', ['--query-gpu=memory.used', '--format=csv,noheader,nounits', '--id=0'], { encoding: 'utf8', timeout: 20_000 }));
            if (step >= 2) used.push({ step, megabytes });
            return step >= 20 || phase === 'completed';
          }, 240);
          const losses = lossesOf(on, 'big');
          const { tokensPerSecond } = await on.status('big');
          await on.place.run(['cancel', 'big']);
          const [first, last] = [mean(losses.slice(0, 2)), mean(losses.slice(-2))];
          if (!(last < first - 1)) throw new Error(`loss ${first} -> ${last} in ${losses.length} steps`);
          const memory = used.map(({ megabytes }) => megabytes);
          if (memory.length < 3 || Math.max(...memory) !== Math.min(...memory)) throw new Error(`memory ${JSON.stringify(used)}`);
          const speed = Math.round(tokensPerSecond ?? 0);
          return `loss ${first.toFixed(2)} -> ${last.toFixed(2)} in ${losses.length} steps, ${speed} tokens/s, ${memory[0]} MiB at each of ${memory.length} looks after step 2`;
        },
      },
    );
  }
  checks.push({
    name: 'services stop on SIGTERM',
    run: async () => {
      await site?.stop();
      site = undefined;
      return 'stopped';
    },
  });
  return checks;
}
