/**
 * The compute thread of a worker: owns the device, the replica and the connection to the exchange, and does one task at a
 * time. Native calls block it, which is why it is a thread of its own. Loaded by piscina (pool.ts) and nobody else; knows no
 * BullMQ. Tasks and their results: tasks.ts.
 */
import { workerData } from 'node:worker_threads';
import { toErrorRecord } from '../config/errors.ts';
import { keys } from '../config/keys.ts';
import type { Control } from '../config/keys.ts';
import type { Message, Origin } from '../config/messages.ts';
import { parseRunSpec } from '../config/run-spec.ts';
import { Device } from '../cuda/device.ts';
import { parseControl } from './control.ts';
import { RedisExchange } from './exchange/redis.ts';
import { evaluateCheckpoint, generate } from './guests.ts';
import { Places } from './places.ts';
import { Replica } from './replica.ts';
import { Signals } from './signals.ts';
import type { Outcome, ReplicaState, StepMessage, Task, TaskValues, ThreadData } from './tasks.ts';

const { config, device: choice, worker, queuesUrl, exchangeUrl, shared } = workerData as ThreadData;
const names = keys(config.redis.prefix);
const signals = new Signals(shared);
const places = new Places();
const exchange = new RedisExchange({ url: exchangeUrl, config, beat: () => signals.checkStop() });
/** Where control keys are read before something is published. */
const queues = queuesUrl === exchangeUrl ? exchange : new RedisExchange({ url: queuesUrl, config, beat: () => signals.checkStop() });
const control = async (run: string): Promise<Control | null> => parseControl((await queues.texts([names.control(run)]))[0]!);

let device: Device | null = null;
let held: { readonly replica: Replica; readonly specText: string } | null = null;

/** Does one task. Never throws: failures are values. */
export default async function serve(task: Task): Promise<Outcome> {
  try {
    signals.beat();
    const value = await perform(task);
    return { ok: true, value, replica: replicaState() };
  } catch (error) {
    return { ok: false, error: toErrorRecord(error), replica: replicaState() };
  }
}

async function perform(task: Task): Promise<TaskValues[Task['kind']]> {
  if ('message' in task) places.use(task.local);
  switch (task.kind) {
    case 'open':
      return open().description;
    case 'steps':
      try {
        return await replicaOf(task.message).steps(task.message, (report) => task.port?.postMessage({ report } satisfies StepMessage));
      } finally {
        // The main thread waits for this: nothing is reported after it.
        task.port?.close();
      }
    case 'shard':
      return replicaOf(task.message).shard(task.message);
    case 'reduce':
      return replicaOf(task.message).reduce(task.message);
    case 'checkpoint':
      return replicaOf(task.message).checkpoint(task.message, { copy: true });
    case 'digest':
      return replicaOf(task.message).digest(task.message);
    case 'eval':
      return evaluate(task.message);
    case 'generate':
      return generate({ device: open(), worker, signals, places }, task.message);
    case 'forget':
      if (held?.replica.run === task.run) release();
      return exchange.removeAll(names.exchangeOf(task.run));
    case 'close':
      break;
  }
  release();
  exchange.close();
  queues.close();
  device?.close();
  device = null;
  return null;
}

function open(): Device {
  device ??= Device.open(choice);
  return device;
}

async function evaluate(message: Message<'eval'>): Promise<TaskValues['eval']> {
  const { replica } = message;
  if (replica !== null) return replicaOf(replica).evaluate({ ...message, replica });
  return evaluateCheckpoint({ device: open(), worker, signals, places }, message);
}

/** The replica of a job's run: the one at hand, or a new one in its place. One run has the device at a time. */
function replicaOf(origin: Origin): Replica {
  const specText = JSON.stringify(origin.spec);
  if (held !== null && held.replica.run === origin.run && held.specText === specText) return held.replica;
  release();
  const spec = parseRunSpec(origin.spec, `spec of run ${origin.run}`);
  const replica = new Replica({ device: open(), exchange, signals, places, control, config, worker, run: origin.run, spec });
  held = { replica, specText };
  return replica;
}

function release(): void {
  held?.replica.close();
  held = null;
}

function replicaState(): ReplicaState {
  return held?.replica.state ?? null;
}
