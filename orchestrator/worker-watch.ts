/**
 * Who lives, which run each worker serves, and what runs want: reads the workers' heartbeats, the claims and the demands, for
 * all runs of one orchestrator. A worker is dead when its heartbeat has not changed for deadAfterMs of time in which Redis could be read:
 * clocks of other machines do not count, and losing sight of everybody is nobody's death. Called by main.ts and driver.ts.
 */
import { keys } from '../config/keys.ts';
import { protocolOf } from '../config/messages.ts';
import type { WorkerRecord } from '../config/messages.ts';
import type { Redis } from '../config/redis.ts';
import type { Config } from '../config/schema.ts';
import type { WorkerView } from './plan.ts';
import type { Demand } from './share.ts';

interface Sighting {
  readonly text: string;
  readonly record: WorkerRecord;
  /** Observed time (see #observedMs) of the last change. */
  changedAtMs: number;
  /** Whether it was ever seen to change: an old record of a dead worker never is. */
  alive: boolean;
}

/** Only the run's own driver claims and releases for it; a claim is freed only of the run that holds it. */
const OWNED = `if redis.call('hget', KEYS[2], 'driver') ~= ARGV[2] then return 0 end`;
const CLAIM = `${OWNED} for i = 3, #ARGV do redis.call('hsetnx', KEYS[1], ARGV[i], ARGV[1]) end return 1`;
const RELEASE = `${OWNED} for i = 3, #ARGV do if redis.call('hget', KEYS[1], ARGV[i]) == ARGV[1] then redis.call('hdel', KEYS[1], ARGV[i]) end end return 1`;
/** Removes a dead worker's record only if it is still the one that was judged. */
const BURY = `if redis.call('hget', KEYS[1], ARGV[1]) == ARGV[2] then return redis.call('hdel', KEYS[1], ARGV[1]) end return 0`;
/** Dead workers' records are kept for some multiples of deadAfterMs, for people to see. */
const BURY_AFTER_DEATHS = 4;

export class WorkerWatch {
  readonly #redis: Redis;
  readonly #config: Config;
  readonly #names: ReturnType<typeof keys>;
  readonly #onError: (error: Error) => void;
  readonly #listeners = new Set<(views: readonly WorkerView[]) => void>();
  readonly #seen = new Map<string, Sighting>();
  #claims: Readonly<Record<string, string>> = {};
  #views: readonly WorkerView[] = [];
  #demands: ReadonlyMap<string, Demand> = new Map();
  #clockOffsetMs = Date.now() - performance.now();
  #signature = '';
  #observedMs = 0;
  #lastLookMs: number | null = null;
  #timer: NodeJS.Timeout | undefined;
  #looking: Promise<void> | null = null;

  constructor(redis: Redis, config: Config, onError: (error: Error) => void) {
    this.#redis = redis;
    this.#config = config;
    this.#names = keys(config.redis.prefix);
    this.#onError = onError;
  }

  get views(): readonly WorkerView[] {
    return this.#views;
  }

  /** What each run wants, by its driver's last word. */
  get demands(): ReadonlyMap<string, Demand> {
    return this.#demands;
  }

  /** Redis' clock, which is one for all orchestrators. */
  get nowMs(): number {
    return Math.round(performance.now() + this.#clockOffsetMs);
  }

  /** The runs that hold a worker. */
  get holders(): readonly string[] {
    return [...new Set(Object.values(this.#claims))];
  }

  /** Ids of all workers of which Redis or a claim knows, dead ones too. */
  get knownIds(): readonly string[] {
    return [...new Set([...this.#seen.keys(), ...Object.keys(this.#claims)])];
  }

  async start(): Promise<void> {
    await this.look();
    const pause = Math.min(this.#config.orchestrator.watchMs, Math.ceil(this.#config.worker.deadAfterMs / 4));
    this.#timer = setInterval(() => void this.look(), pause);
  }

  stop(): void {
    clearInterval(this.#timer);
  }

  /** The listener hears every change: who lives, in which state, with which replica, held by which run, and what runs want. */
  listen(listener: (views: readonly WorkerView[]) => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** Reads once more; never throws. */
  async look(): Promise<void> {
    this.#looking ??= this.#lookNow()
      .catch((error: Error) => {
        this.#lastLookMs = null;
        this.#onError(error);
      })
      .finally(() => {
        this.#looking = null;
      });
    await this.#looking;
  }

  async #lookNow(): Promise<void> {
    const beganMs = performance.now();
    const { workers: workersKey, claims: claimsKey, demands: demandsKey } = this.#names;
    const [workers, claims, demands, [seconds, microseconds]] = await Promise.all([
      this.#redis.hgetall(workersKey), this.#redis.hgetall(claimsKey), this.#redis.hgetall(demandsKey), this.#redis.time(),
    ]);
    const nowMs = performance.now();
    // Only time between two looks that both came back at once counts: what happened in a gap was not observed.
    const gapMs = this.#lastLookMs === null || nowMs - beganMs > this.#config.worker.deadAfterMs / 2 ? 0 : nowMs - this.#lastLookMs;
    this.#observedMs += Math.min(gapMs, this.#config.worker.deadAfterMs / 2);
    this.#lastLookMs = nowMs;
    this.#clockOffsetMs = Number(seconds) * 1_000 + Number(microseconds) / 1_000 - nowMs;
    this.#claims = claims;
    this.#demands = new Map(Object.entries(demands).map(([run, text]) => [run, JSON.parse(text) as Demand]));
    for (const [id, text] of Object.entries(workers)) this.#see(id, text);
    for (const id of this.#seen.keys()) if (workers[id] === undefined) this.#seen.delete(id);
    await this.#bury();
    this.#tell();
  }

  #see(id: string, text: string): void {
    const before = this.#seen.get(id);
    if (before?.text === text) return;
    const record = JSON.parse(text) as WorkerRecord;
    const fresh = Math.abs(Date.now() - record.heartbeatAtMs) < this.#config.worker.deadAfterMs;
    this.#seen.set(id, { text, record, changedAtMs: this.#observedMs, alive: before !== undefined || fresh });
  }

  #lives(sighting: Sighting): boolean {
    return sighting.alive && this.#observedMs - sighting.changedAtMs < this.#config.worker.deadAfterMs;
  }

  async #bury(): Promise<void> {
    for (const [id, sighting] of this.#seen) {
      if (this.#observedMs - sighting.changedAtMs < BURY_AFTER_DEATHS * this.#config.worker.deadAfterMs) continue;
      await this.#redis.eval(BURY, 1, this.#names.workers, id, sighting.text);
      this.#seen.delete(id);
    }
  }

  #tell(): void {
    this.#views = [...this.#seen.values()]
      .filter((sighting) => this.#lives(sighting))
      .map(({ record }) => ({
        id: record.id,
        incarnation: record.incarnation,
        protocol: protocolOf(record),
        precisions: record.precisions,
        state: record.state,
        replica: record.replica,
        startedAtMs: record.startedAtMs,
        lastExit: record.lastExit ?? null,
        heldBy: this.#claims[record.id] ?? null,
      }));
    const signature = JSON.stringify([this.#views, [...this.#demands]]);
    if (signature === this.#signature) return;
    this.#signature = signature;
    for (const listener of this.#listeners) listener(this.#views);
  }

  /** Claims those of `workers` that no run holds; returns how things stand after. `token`: of the driver that owns the run. */
  async claim(run: string, token: string, workers: readonly string[]): Promise<readonly WorkerView[]> {
    await this.#redis.eval(CLAIM, 2, this.#names.claims, this.#names.run(run), run, token, ...workers);
    await this.#looking;
    await this.look();
    return this.#views;
  }

  async release(run: string, token: string, workers: readonly string[]): Promise<void> {
    await this.#redis.eval(RELEASE, 2, this.#names.claims, this.#names.run(run), run, token, ...workers);
    await this.#looking;
    await this.look();
  }

  /** Frees every claim of a run, also on workers that nobody knows any more. */
  async releaseAll(run: string, token: string): Promise<void> {
    const claims = await this.#redis.hgetall(this.#names.claims);
    const own = Object.keys(claims).filter((id) => claims[id] === run);
    if (own.length > 0) await this.release(run, token, own);
  }
}
