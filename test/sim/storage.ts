/**
 * What a simulated world remembers: a Redis with jobs as BullMQ has them, claims, control, the run's record and the exchange, which
 * can lose its last second; and a disk, which loses nothing. It does what it is asked and decides nothing about a run. Used by all
 * parts of the world (world.ts).
 */
import { branchOf, parseCheckpointName } from '../../config/branches.ts';
import type { Return } from '../../config/branches.ts';
import type { ErrorRecord } from '../../config/errors.ts';
import type { Control } from '../../config/keys.ts';
import type { RunRecord } from '../../config/messages.ts';
import type { RunSpec } from '../../config/run-spec.ts';
import type { CheckpointPlace } from '../../orchestrator/plan.ts';
import type { JobAddress, NewJob } from '../../orchestrator/run-state.ts';
import type { Ground } from './ground.ts';

/** As long as the lock of a job that its worker left lasts: the run must not wait for it. */
const STALL_MS = 30_000;

export const RUN = 'sim.1';

export interface SimJob extends NewJob {
  state: 'waiting' | 'active' | 'completed' | 'failed';
  processedAtMs: number | null;
  attempts: number;
  result: unknown;
  error: ErrorRecord | null;
  readonly progress: unknown[];
  copied: boolean;
  readonly parent: string | null;
  /** Keys of the jobs that it waits for. */
  readonly children: readonly string[];
  /** Of its last taking: whoever took it before can change nothing of it. */
  token: number;
}

export const hasEnded = ({ state }: SimJob): boolean => state === 'completed' || state === 'failed';
export const keyOf = ({ worker, id }: JobAddress): string => `${worker ?? ''}/${id}`;

export interface SimOrigin {
  readonly epoch: number;
  readonly step: number;
  readonly checkpoint: CheckpointPlace | null;
  readonly rollbacks?: readonly Return[];
}

/** The fields of every message; each job has some of them. */
export interface AnyMessage extends SimOrigin {
  readonly fromStep: number;
  readonly stepCount: number;
  readonly shard: number;
  readonly shardCount: number;
  readonly directory: string;
  readonly replica?: SimOrigin;
  readonly spec: RunSpec;
}

/** What the exchange calls the sum of a step, of the branch that these rollbacks led to. */
export const sumKey = (rollbacks: readonly Return[] | undefined, step: number): string => `${branchOf(rollbacks, step)}:${step}`;

export class SimRedis {
  readonly #ground: Ground;
  /** By queue and id, as BullMQ has them. */
  jobs = new Map<string, SimJob>();
  /** Those that wait for a worker, in the order in which they came. */
  readonly waiting = new Set<SimJob>();
  #taken = 0;
  claims = new Map<string, string>();
  control: Control | null = null;
  record: RunRecord;
  shards = new Map<string, { digest: string; from: number; worker: string; epoch: number }>();
  /** By sumKey: the state that it leads from, and that it leads to. */
  sums = new Map<string, { from: number; to: number }>();
  /** It lost its last second, and no orchestrator has heard of it yet. */
  lost = false;

  constructor(ground: Ground, record: RunRecord) {
    this.#ground = ground;
    this.record = record;
  }

  /** The same job again changes nothing. */
  add(job: NewJob, parent: string | null, children: readonly string[]): void {
    if (this.jobs.has(keyOf(job))) return;
    const added: SimJob = { ...job, state: 'waiting', processedAtMs: null, attempts: 0, result: null, error: null, progress: [], copied: false, parent, children, token: 0 };
    this.jobs.set(keyOf(job), added);
    this.wait(added);
  }

  /** Those in the hands of a worker stay. */
  remove(addresses: readonly JobAddress[]): void {
    for (const each of addresses) {
      const job = this.jobs.get(keyOf(each));
      if (job === undefined || job.state === 'active') continue;
      this.jobs.delete(keyOf(each));
      this.waiting.delete(job);
    }
  }

  /** A worker takes the job; returns the token that says so. */
  take(job: SimJob): number {
    this.waiting.delete(job);
    job.state = 'active';
    job.token = ++this.#taken;
    job.processedAtMs = this.#ground.now;
    return job.token;
  }

  wait(job: SimJob): void {
    job.state = 'waiting';
    if (this.jobs.get(keyOf(job)) === job) this.waiting.add(job);
  }

  /** Nobody renews the lock of this job: it waits again when that is over. */
  stall(job: SimJob): void {
    const { token } = job;
    this.#ground.at(STALL_MS, () => {
      const now = this.jobs.get(keyOf(job));
      if (now?.state === 'active' && now.token === token) this.wait(now);
    });
  }

  /** A reduce job waits for its children. */
  ripe(job: SimJob): boolean {
    return job.children.every((child) => !this.jobs.has(child) || this.jobs.get(child)!.state === 'completed');
  }

  /** Another run lets the worker go after a while. */
  releaseLater(worker: string, mostMs: number): void {
    this.#ground.at(this.#ground.pick(mostMs), () => this.claims.get(worker) === 'other' && this.claims.delete(worker));
  }

  /** What it holds now. Returns how to put that back; `isHeld` tells whether some worker still has the job of that token in its hands. */
  remember(): (isHeld: (token: number) => boolean) => void {
    const jobs = [...this.jobs].map(([key, job]): [string, SimJob] => [key, { ...job, progress: [...job.progress] }]);
    const { control, record } = this;
    const [claims, shards, sums] = [new Map(this.claims), new Map(this.shards), new Map(this.sums)];
    return (isHeld) => {
      this.control = control;
      this.record = record;
      this.claims = claims;
      for (const [id, run] of claims) if (run === 'other') this.releaseLater(id, 1_000);
      this.jobs = new Map(jobs);
      this.waiting.clear();
      for (const job of this.jobs.values()) {
        if (job.state === 'waiting') this.waiting.add(job);
        else if (job.state === 'active' && !isHeld(job.token)) this.stall(job);
      }
      // The exchange may be another server, which was not killed, or which keeps nothing.
      const fate = this.#ground.pick(3);
      if (fate === 0) [this.shards, this.sums] = [shards, sums];
      if (fate === 1) [this.shards, this.sums] = [new Map(), new Map()];
      this.lost = true;
    };
  }
}

export class SimDisk {
  /** Complete checkpoints by step, of all branches. */
  checkpoints: readonly (CheckpointPlace & { readonly state: number })[] = [];
  readonly damaged = new Set<string>();

  /** Another under that name is replaced. */
  write(checkpoint: CheckpointPlace & { readonly state: number }): void {
    this.checkpoints = [...this.checkpoints.filter(({ directory }) => directory !== checkpoint.directory), checkpoint].sort((a, b) => a.step - b.step);
    this.damaged.delete(checkpoint.directory);
  }

  delete(directories: readonly string[]): void {
    this.checkpoints = this.checkpoints.filter(({ directory }) => !directories.includes(directory));
  }

  find(directory: string): (CheckpointPlace & { readonly state: number }) | undefined {
    return this.checkpoints.find((each) => each.directory === directory);
  }

  /** The checkpoints that the names of these rollbacks' branch lead to. */
  present(rollbacks: readonly Return[]): CheckpointPlace[] {
    const named = this.checkpoints.map(({ directory }) => ({ directory, ...parseCheckpointName(directory.split('/').at(-1)!)! }));
    return named.filter(({ step, branch }) => branchOf(rollbacks, step) === branch).map(({ directory, step }) => ({ directory, step }));
  }
}
