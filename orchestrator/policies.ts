/**
 * Looks whether a Redis has been told to evict keys since it was checked, and tells the drivers of runs, once a change. Made
 * by main.ts, which says when to look; it changes nothing in Redis.
 */
import type { Logger } from 'pino';
import { errorCode, toErrorRecord } from '../config/errors.ts';
import type { ErrorRecord } from '../config/errors.ts';
import { requirePolicy } from '../config/redis.ts';
import type { Redis } from '../config/redis.ts';

export class Policies {
  readonly #servers: ReadonlyMap<string, Redis>;
  readonly #logger: Logger;
  readonly #listeners = new Set<(what: string, error: ErrorRecord) => void>();
  /** What is wrong now, by address. */
  readonly #wrong = new Map<string, ErrorRecord>();
  #looking = false;

  /** `servers`: connections by address. */
  constructor(servers: ReadonlyMap<string, Redis>, logger: Logger) {
    this.#servers = servers;
    this.#logger = logger;
  }

  /** The listener hears at once what is wrong, and later what becomes so. Returns how to stop that. */
  listen(heard: (what: string, error: ErrorRecord) => void): () => void {
    this.#listeners.add(heard);
    for (const error of this.#wrong.values()) heard('Redis', error);
    return () => this.#listeners.delete(heard);
  }

  /** One look at each server that is there; none while the last is still waiting for an answer. Never throws. */
  async look(): Promise<void> {
    if (this.#looking) return;
    this.#looking = true;
    for (const [url, redis] of this.#servers) {
      // ioredis sends INFO while a connection is being opened, and never answers it when the opening fails.
      if (redis.status !== 'ready') continue;
      try {
        await requirePolicy(redis, url);
        this.#wrong.delete(url);
      } catch (error) {
        const record = toErrorRecord(error);
        if (errorCode(error) !== 'REDIS_POLICY' || this.#wrong.get(url)?.message === record.message) continue;
        this.#wrong.set(url, record);
        this.#logger.error(record, 'Redis');
        for (const heard of this.#listeners) heard('Redis', record);
      }
    }
    this.#looking = false;
  }
}
