/**
 * The name of every key and channel that this project has in Redis, besides BullMQ's own (which live under the same
 * prefix, one namespace for each queue). Orchestrator, workers and clients meet only here. Pure.
 *
 *   key                                   type     owner         what
 *   <p>:workers                           hash     workers       worker id -> WorkerRecord (JSON); a dead one is removed by the orchestrator
 *   <p>:claims                            hash     orchestrator  worker id -> the run that uses it: a worker serves one run at a time
 *   <p>:demands                           hash     orchestrator  run -> Demand (JSON, orchestrator/share.ts) of each run that wants workers
 *   <p>:runs                              set      client        ids of all runs that have a record
 *   <p>:run:<run>                         hash     client, then orchestrator   spec, record (JSON)
 *   <p>:run:<run>:control                 string   orchestrator  Control (JSON): epoch and what the workers are to do
 *   <p>:run:<run>:wish                    string   client        'pause' | 'resume' | 'cancel' and an id: what the user asked for last, until it is done
 *   <p>:run:<run>:events                  stream   orchestrator  RunEvent (JSON in field `e`), bounded
 *   <p>:control, <p>:wishes               channels               a run's id is published when its control / wish changes
 *   <p>:x:<run>:shard:<step>:<shard>      string   workers       ShardResult (JSON) of a published gradient, written last
 *   <p>:x:<run>:shard:<step>:<shard>:<i>  string   workers       chunk i of it (binary)
 *   <p>:x:<run>:sum:<step>[:<i>]          string   workers       the same of a step's reduced gradient (ReduceResult)
 * On branch <b> of a run that was rolled back (branches.ts), <p>:x:<run>:branch:<b>:shard: and <p>:x:<run>:branch:<b>:sum:
 * The <p>:x: keys lie in the Redis of the exchange, the others in the Redis of the queues.
 */
import type { QueueName } from './messages.ts';

export interface Control {
  readonly epoch: number;
  /** `run`: go on. `yield`: stop at the next step boundary. `stop`: stop at the next microbatch (pause, cancel). */
  readonly command: 'run' | 'yield' | 'stop';
}

export const keys = (prefix: string) => ({
  workers: `${prefix}:workers`,
  claims: `${prefix}:claims`,
  demands: `${prefix}:demands`,
  runs: `${prefix}:runs`,
  run: (run: string) => `${prefix}:run:${run}`,
  control: (run: string) => `${prefix}:run:${run}:control`,
  wish: (run: string) => `${prefix}:run:${run}:wish`,
  events: (run: string) => `${prefix}:run:${run}:events`,
  controlChannel: `${prefix}:control`,
  wishChannel: `${prefix}:wishes`,
  shardGradient: (run: string, step: number, shard: number, branch = 0) => `${exchangeOf(prefix, run, branch)}shard:${step}:${shard}`,
  reducedGradient: (run: string, step: number, branch = 0) => `${exchangeOf(prefix, run, branch)}sum:${step}`,
  exchangeOf: (run: string) => exchangeOf(prefix, run, 0),
});

const exchangeOf = (prefix: string, run: string, branch: number): string => `${prefix}:x:${run}:${branch === 0 ? '' : `branch:${branch}:`}`;

/** The queue that only one worker serves. */
export const workerQueue = (queue: Exclude<QueueName, 'runs'>, worker: string): string => `${queue}-${worker}`;
