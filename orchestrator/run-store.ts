/**
 * A run's keys in Redis: spec, record, control, wish, events. Writes of a driver are fenced: they carry the token of the
 * driver that owns the run, and one whose token is no longer there changes nothing. Called by client.ts (creating, reading,
 * wishing) and driver.ts (the rest). Names are in config/keys.ts.
 */
import { randomUUID } from 'node:crypto';
import { NnError } from '../config/errors.ts';
import { keys } from '../config/keys.ts';
import type { Control } from '../config/keys.ts';
import { PROTOCOL, TERMINAL_PHASES } from '../config/messages.ts';
import type { RunEvent, RunPhase, RunRecord } from '../config/messages.ts';
import type { Redis } from '../config/redis.ts';
import type { RunSpec } from '../config/run-spec.ts';
import type { Config } from '../config/schema.ts';
import { retriedRecord } from './attempts.ts';
import type { Demand } from './share.ts';

export type Wish = 'pause' | 'resume' | 'cancel';

const CREATE = `if redis.call('exists', KEYS[1]) == 1 then return 0 end
redis.call('hset', KEYS[1], 'spec', ARGV[2], 'record', ARGV[3]) redis.call('sadd', KEYS[2], ARGV[1]) return 1`;
/** Run hash must hold the driver's token; -1 when the run is gone, 0 when another driver has it. */
const OWNED = `local owner = redis.call('hget', KEYS[1], 'driver') if owner ~= ARGV[1] then return 0 end `;
const OWN = `local before = redis.call('hget', KEYS[1], 'protocol')
redis.call('hset', KEYS[1], 'driver', ARGV[1], 'protocol', ARGV[2]) return {tonumber(before or 1), redis.call('hget', KEYS[1], 'server') or ''}`;
const NOTE_SERVER = `${OWNED} redis.call('hset', KEYS[1], 'server', ARGV[2]) return 1`;
const WRITE_RECORD = `${OWNED} redis.call('hset', KEYS[1], 'record', ARGV[2]) return 1`;
const WRITE_CONTROL = `${OWNED} redis.call('set', KEYS[2], ARGV[2]) redis.call('publish', KEYS[3], ARGV[3]) return 1`;
const DELETE_CONTROL = `${OWNED} redis.call('del', KEYS[2]) redis.call('publish', KEYS[3], ARGV[2]) return 1`;
const CLOSE = `${OWNED} redis.call('hset', KEYS[1], 'record', ARGV[2]) redis.call('del', KEYS[2])
redis.call('hdel', KEYS[4], ARGV[6]) redis.call('xadd', KEYS[3], 'MAXLEN', '~', ARGV[3], '*', 'e', ARGV[4]) redis.call('expire', KEYS[3], ARGV[5]) return 1`;

const PUBLISH = `${OWNED} redis.call('xadd', KEYS[2], 'MAXLEN', '~', ARGV[2], '*', 'e', ARGV[3]) return 1`;
const DEMAND = `${OWNED} if ARGV[3] == '' then redis.call('hdel', KEYS[2], ARGV[2]) else redis.call('hset', KEYS[2], ARGV[2], ARGV[3]) end return 1`;
const LEAVE = `${OWNED} redis.call('hdel', KEYS[1], 'driver') return 1`;
const SWEEP = `${OWNED} redis.call('del', KEYS[2], KEYS[3]) redis.call('expire', KEYS[4], ARGV[2]) redis.call('publish', KEYS[5], ARGV[3])
redis.call('hdel', KEYS[1], 'driver') return 1`;
const FORGET = `redis.call('hdel', KEYS[1], ARGV[1]) local claims = redis.call('hgetall', KEYS[2])
for i = 1, #claims, 2 do if claims[i + 1] == ARGV[1] then redis.call('hdel', KEYS[2], claims[i]) end end return 1`;
/** Only if nobody changed the record since it was read; a driver of before loses the run by the new token. */
const RETRY = `if redis.call('hget', KEYS[1], 'record') ~= ARGV[1] then return 0 end
redis.call('hset', KEYS[1], 'record', ARGV[2], 'driver', ARGV[3]) redis.call('del', KEYS[2], KEYS[3], KEYS[4])
redis.call('xadd', KEYS[4], '*', 'e', ARGV[4]) redis.call('publish', KEYS[5], ARGV[5]) return 1`;

const DROP_WISH = `if redis.call('get', KEYS[1]) == ARGV[1] then redis.call('del', KEYS[1]) end return 1`;

/** A driver found that the run is another's now: it must stop without a further word. */
export class Fenced extends Error {}

export interface StoredRun {
  readonly spec: RunSpec;
  readonly record: RunRecord;
}

export class RunStore {
  readonly #redis: Redis;
  readonly #config: Config;
  readonly #names: ReturnType<typeof keys>;

  constructor(redis: Redis, config: Config) {
    this.#redis = redis;
    this.#config = config;
    this.#names = keys(config.redis.prefix);
  }

  /** Creates a run unless there is one of that name; tells which. Atomic. */
  async create(run: string, spec: RunSpec, record: RunRecord): Promise<boolean> {
    return (await this.#redis.eval(CREATE, 2, this.#names.run(run), this.#names.runs, run, JSON.stringify(spec), JSON.stringify(record))) === 1;
  }

  async ids(): Promise<string[]> {
    return (await this.#redis.smembers(this.#names.runs)).sort();
  }

  /** Throws RUN_NOT_FOUND. */
  async read(run: string): Promise<StoredRun> {
    const [spec, record] = await this.#redis.hmget(this.#names.run(run), 'spec', 'record');
    if (spec === null || spec === undefined || record === null || record === undefined) {
      throw notFound(run);
    }
    return { spec: JSON.parse(spec) as RunSpec, record: readRecord(record) };
  }

  async records(): Promise<RunRecord[]> {
    const ids = await this.ids();
    const texts = await Promise.all(ids.map((run) => this.#redis.hget(this.#names.run(run), 'record')));
    return texts.flatMap((text) => (text === null ? [] : [readRecord(text)]));
  }

  /** Throws RUN_NOT_FOUND, or RUN_STATE when the run is over. */
  async wish(run: string, wish: Wish): Promise<void> {
    const { record } = await this.read(run);
    if (TERMINAL_PHASES.includes(record.phase)) throw new NnError('RUN_STATE', `run ${run} is ${record.phase}; it cannot be ${PAST[wish]}`, { run, phase: record.phase });
    await this.#redis.set(this.#names.wish(run), `${wish} ${randomUUID()}`);
    await this.#redis.publish(this.#names.wishChannel, run);
  }

  /** The wish that nobody has dropped yet; `id` tells it from an equal one before it. */
  async readWish(run: string): Promise<{ readonly wish: Wish; readonly id: string } | null> {
    const id = await this.#redis.get(this.#names.wish(run));
    return id === null ? null : { wish: id.split(' ')[0] as Wish, id };
  }

  /** Forgets a wish once what it led to is written down, unless there is a newer one. */
  async dropWish(run: string, id: string): Promise<void> {
    await this.#redis.eval(DROP_WISH, 1, this.#names.wish(run), id);
  }

  async readControl(run: string): Promise<Control | null> {
    const text = await this.#redis.get(this.#names.control(run));
    return text === null ? null : (JSON.parse(text) as Control);
  }

  /**
   * The run belongs to this driver from here on; whoever drove it before is fenced off. Returns the protocol that that one spoke, and
   * the process of Redis that it spoke to, as noteServer has it; the empty string: it did not say.
   */
  async own(run: string, token: string): Promise<{ readonly protocol: number; readonly server: string }> {
    const [protocol, server] = (await this.#redis.eval(OWN, 1, this.#names.run(run), token, PROTOCOL)) as [number, string];
    return { protocol, server };
  }

  /** What this process of Redis says of the run is true, or was made void. Throws Fenced. */
  async noteServer(run: string, token: string, server: string): Promise<void> {
    this.#mustOwn(await this.#redis.eval(NOTE_SERVER, 1, this.#names.run(run), token, server));
  }

  /** Throws Fenced. */
  async writeRecord(run: string, token: string, record: RunRecord): Promise<void> {
    this.#mustOwn(await this.#redis.eval(WRITE_RECORD, 1, this.#names.run(run), token, JSON.stringify(record)));
  }

  /** Writes the control and tells the workers. Throws Fenced. */
  async writeControl(run: string, token: string, control: Control): Promise<void> {
    const { run: hash, control: key, controlChannel } = this.#names;
    this.#mustOwn(await this.#redis.eval(WRITE_CONTROL, 3, hash(run), key(run), controlChannel, token, JSON.stringify(control), run));
  }

  /** From here on every job of the run is dropped by the workers. Throws Fenced. */
  async deleteControl(run: string, token: string): Promise<void> {
    const { run: hash, control: key, controlChannel } = this.#names;
    this.#mustOwn(await this.#redis.eval(DELETE_CONTROL, 3, hash(run), key(run), controlChannel, token, run));
  }

  /** The last word: final record, final event; the wish is deleted, the events expire. The driver still cleans up. Throws Fenced. */
  async close(run: string, token: string, record: RunRecord, last: RunEvent): Promise<void> {
    const { run: hash, wish, events, demands } = this.#names;
    const { eventsKept, eventsExpireSeconds } = this.#config.orchestrator;
    this.#mustOwn(await this.#redis.eval(CLOSE, 4, hash(run), wish(run), events(run), demands, token, JSON.stringify(record), eventsKept, JSON.stringify(last), eventsExpireSeconds, run));
  }

  #mustOwn(reply: unknown): void {
    if (reply !== 1) throw new Fenced('another orchestrator drives this run');
  }

  /** Throws Fenced. */
  async publish(run: string, token: string, event: RunEvent): Promise<void> {
    const { run: hash, events } = this.#names;
    this.#mustOwn(await this.#redis.eval(PUBLISH, 2, hash(run), events(run), token, this.#config.orchestrator.eventsKept, JSON.stringify(event)));
  }

  /** What the run wants of the workers, for all orchestrators to see; null: nothing. Throws Fenced. */
  async writeDemand(run: string, token: string, demand: Demand | null): Promise<void> {
    this.#mustOwn(await this.#redis.eval(DEMAND, 2, this.#names.run(run), this.#names.demands, token, run, demand === null ? '' : JSON.stringify(demand)));
  }

  /** A demand and claims that nobody drives any more: others are not to wait for them. */
  async forget(run: string): Promise<void> {
    await this.#redis.eval(FORGET, 2, this.#names.demands, this.#names.claims, run);
  }

  /** Whether the run is still this driver's. */
  async owns(run: string, token: string): Promise<boolean> {
    return (await this.#redis.hget(this.#names.run(run), 'driver')) === token;
  }

  /** The driver has done all that it had to. */
  async leave(run: string, token: string): Promise<void> {
    await this.#redis.eval(LEAVE, 1, this.#names.run(run), token);
  }

  /**
   * Puts a run that failed or was cancelled back to `queued`, for a new attempt; of several who ask at once one succeeds.
   * Whoever drove it before can change nothing any more. Throws RUN_NOT_FOUND, or RUN_STATE when it is live or completed.
   */
  async retry(run: string): Promise<RunRecord> {
    const { run: hash, wish, control, events, controlChannel } = this.#names;
    const text = await this.#redis.hget(hash(run), 'record');
    if (text === null) throw notFound(run);
    const before = readRecord(text);
    const refuse = (phase: RunPhase): NnError => new NnError('RUN_STATE', `run ${run} is ${phase}; only a run that failed or was cancelled can be tried again`, { run, phase });
    if (before.phase !== 'failed' && before.phase !== 'cancelled') throw refuse(before.phase);
    const next = retriedRecord(before);
    const event: RunEvent = { type: 'phase', phase: 'queued', atMs: Date.now() };
    const names = [hash(run), wish(run), control(run), events(run), controlChannel];
    const done = await this.#redis.eval(RETRY, names.length, ...names, text, JSON.stringify(next), `retry ${randomUUID()}`, JSON.stringify(event), run);
    if (done !== 1) throw refuse((await this.read(run)).record.phase);
    return next;
  }

  /** What is left of a run that is over, besides its record: should a crash have left any. */
  async sweep(run: string, token: string): Promise<void> {
    const { run: hash, control, wish, events, controlChannel } = this.#names;
    const names = [hash(run), control(run), wish(run), events(run), controlChannel];
    await this.#redis.eval(SWEEP, names.length, ...names, token, this.#config.orchestrator.eventsExpireSeconds, run);
  }
}

const notFound = (run: string): NnError => new NnError('RUN_NOT_FOUND', `there is no run named ${JSON.stringify(run)}; \`cuda-nn runs\` lists those there are`, { run });

/** A record as this version has it: one that an older version wrote lacks some fields. */
export function readRecord(text: string): RunRecord {
  const record = JSON.parse(text) as RunRecord;
  const faults = (record.faults ?? []).map((fault) => ({ ...fault, worker: fault.worker ?? null }));
  return {
    ...record, faults, faultCounts: record.faultCounts ?? {}, kills: record.kills ?? [], rollbacks: record.rollbacks ?? [],
    attempts: record.attempts ?? [], runningMs: record.runningMs ?? 0,
  };
}

const PAST: Record<Wish, string> = { pause: 'paused', resume: 'resumed', cancel: 'cancelled' };
