/**
 * Worker processes over a WorkerWorld, as a suite of tests has them: supervised, all stopped after each test; their records, what
 * their supervisors saw, and what became of the jobs that they were given. It decides nothing: the orchestrator's part is the
 * test's. Used by test/system/worker-{process,control,checkpoint,evidence}.test.ts.
 */
import { once } from 'node:events';
import { expect } from 'chai';
import type { Job, Queue, QueueEvents } from 'bullmq';
import { decodeFailure } from '../../config/errors.ts';
import type { ErrorRecord } from '../../config/errors.ts';
import { workerQueue } from '../../config/keys.ts';
import { parseResult } from '../../config/messages.ts';
import type { Result, WorkerRecord, results } from '../../config/messages.ts';
import { PRESETS } from '../../config/presets.ts';
import type { RunSpec, RunSpecInput } from '../../config/run-spec.ts';
import { startSupervisor } from '../../workers/main.ts';
import type { Supervisor, SupervisorEvent, SupervisorOptions } from '../../workers/main.ts';
import { eventually } from './wait.ts';
import { originOf } from './worker-world.ts';
import type { WorkerWorld } from './worker-world.ts';

const JOB_DEADLINE_MS = 40_000;

/** Changes of a spec with which one microbatch takes many seconds on one core. */
export const SLOW_MICROBATCH = {
  model: { ...PRESETS.demo, vocabSize: 512, hiddenSize: 512, headSize: 128, ffnSize: 2048 },
  batch: { shards: 1, microBatches: 1, sequences: 8, sequenceLength: 512 },
  recompute: 'layer',
} as const satisfies Partial<RunSpecInput>;

export interface JobQueue {
  readonly queue: Queue;
  readonly events: QueueEvents;
}

/** One worker with a supervisor of its own, and the queue that only it serves. */
export interface WorkerBench extends JobQueue {
  readonly id: string;
  /** Of its first process. */
  readonly pid: number;
  readonly supervisor: Supervisor;
}

/** Settings that differ from the world's. */
export interface BenchSettings {
  readonly worker?: Record<string, number>;
  readonly queue?: Record<string, number>;
}

type Exit = Extract<SupervisorEvent, { type: 'exited' }>;

export class WorkerProcesses {
  readonly #world: WorkerWorld;
  #supervisors: Supervisor[] = [];
  #started = 0;
  /** What the supervisors of this test saw. */
  log: SupervisorEvent[] = [];

  constructor(world: WorkerWorld) {
    this.#world = world;
  }

  get exits(): Exit[] {
    return this.log.filter((event) => event.type === 'exited');
  }

  /** A supervisor that is not waited for. */
  supervise(options: Partial<SupervisorOptions> = {}): Supervisor {
    const supervisor = startSupervisor({
      config: this.#world.config, device: { library: 'cpu', indices: 'cpu' }, count: 1, idPrefix: `s${this.#started++}`, onEvent: (event) => this.log.push(event), ...options,
    });
    this.#supervisors.push(supervisor);
    return supervisor;
  }

  /** A supervisor whose workers are ready. */
  async start(options: Partial<SupervisorOptions> = {}): Promise<{ supervisor: Supervisor; ids: string[] }> {
    const supervisor = this.supervise(options);
    await supervisor.ready;
    return { supervisor, ids: supervisor.workers().map(({ id }) => id) };
  }

  async bench({ worker = {}, queue = {} }: BenchSettings = {}): Promise<WorkerBench> {
    const { config } = this.#world;
    const { supervisor } = await this.start({ config: { ...config, worker: { ...config.worker, ...worker }, queue: { ...config.queue, ...queue } } });
    const { id, pid } = supervisor.workers()[0]!;
    return { id, pid, supervisor, ...(await this.#world.queue(workerQueue('train', id))) };
  }

  /** What Redis holds of a worker; undefined: nothing. */
  async record(id: string): Promise<WorkerRecord | undefined> {
    const text = await this.#world.redis.hget(this.#world.names.workers, id);
    return text === null ? undefined : (JSON.parse(text) as WorkerRecord);
  }

  /** The record of the process that came after that one. */
  successor({ id, incarnation }: WorkerRecord): Promise<WorkerRecord> {
    return eventually(`another incarnation of ${id}`, async () => {
      const now = await this.record(id);
      return now?.incarnation === incarnation ? undefined : now;
    });
  }

  /** After a test: everything is stopped, and nothing is left in Redis. */
  async clear(): Promise<void> {
    await Promise.all(this.#supervisors.map((supervisor) => supervisor.stop()));
    this.#supervisors = [];
    this.log = [];
    await this.#world.clear();
  }
}

export const addSteps = (queue: Queue, spec: RunSpec, fromStep: number, stepCount: number, options: object = {}): Promise<Job> =>
  queue.add('steps', { ...originOf(spec), fromStep, stepCount }, options);

/** A `steps` job that has reported a step. */
export async function stepsUnderWay({ queue, events }: JobQueue, spec: RunSpec, fromStep: number, stepCount: number, options: object = {}): Promise<Job> {
  const progressed = once(events, 'progress');
  const job = await addSteps(queue, spec, fromStep, stepCount, options);
  await progressed;
  return job;
}

/** The result of a job that must complete. */
export const outcomeOf = async <Name extends keyof typeof results>(name: Name, job: Job, events: QueueEvents): Promise<Result<Name>> =>
  parseResult(name, await job.waitUntilFinished(events, JOB_DEADLINE_MS));

/** The error of a job that must fail. */
export async function failureOf(job: Job, events: QueueEvents): Promise<ErrorRecord> {
  const error: unknown = await job.waitUntilFinished(events, JOB_DEADLINE_MS).then(() => undefined, (reason: unknown) => reason);
  expect(error, 'the job did not fail').to.be.instanceOf(Error);
  return decodeFailure((error as Error).message);
}
