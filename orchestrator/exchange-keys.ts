/**
 * Deletes what a run has in the exchange, by name only: the orchestrator never reads a tensor. Called by driver.ts.
 */
import { branchOf } from '../config/branches.ts';
import { keys } from '../config/keys.ts';
import type { Rollback } from '../config/messages.ts';
import type { Redis } from '../config/redis.ts';
import type { Config } from '../config/schema.ts';
import { parameterShapes } from '../config/presets.ts';
import { gradientBytes } from './plan.ts';
import type { RunSpec } from '../config/run-spec.ts';

const PAGE = 512;
const PADDING_BYTES = 256;

export class ExchangeKeys {
  readonly #redis: Redis;
  readonly #config: Config;
  readonly #names: ReturnType<typeof keys>;

  constructor(redis: Redis, config: Config) {
    this.#redis = redis;
    this.#config = config;
    this.#names = keys(config.redis.prefix);
  }

  /** The last step of the unbroken row of reduced gradients that begins after `from`, looking no further than `through`. */
  async logThrough(run: string, from: number, through: number, rollbacks: readonly Rollback[]): Promise<number> {
    for (let first = from + 1; first <= through; first += PAGE) {
      const steps = Array.from({ length: Math.min(PAGE, through - first + 1) }, (_, index) => first + index);
      const there = await Promise.all(steps.map((step) => this.#redis.exists(this.#names.reducedGradient(run, step, branchOf(rollbacks, step)))));
      const gap = there.indexOf(0);
      if (gap !== -1) return first + gap - 1;
    }
    return Math.max(from, through);
  }

  /** Deletes the reduced gradients of steps from+1 to through, of the branch that `rollbacks` led to. */
  async trim(run: string, spec: RunSpec, from: number, through: number, rollbacks: readonly Rollback[] = []): Promise<void> {
    // The workers' flat buffers pad each tensor a little.
    const bytes = gradientBytes(spec) + PADDING_BYTES * parameterShapes(spec.model).length;
    const chunks = Math.ceil(bytes / this.#config.exchange.chunkBytes);
    for (let step = from + 1; step <= through; step++) {
      const key = this.#names.reducedGradient(run, step, branchOf(rollbacks, step));
      await this.#redis.unlink(key, ...Array.from({ length: chunks }, (_, index) => `${key}:${index}`));
    }
  }

  /** Deletes everything of a run, a page at a time, while `mayGoOn` says so. */
  async erase(run: string, mayGoOn: () => Promise<boolean>): Promise<void> {
    let cursor = '0';
    do {
      const [next, page] = await this.#redis.scan(cursor, 'MATCH', `${this.#names.exchangeOf(run)}*`, 'COUNT', PAGE);
      cursor = next;
      if (page.length > 0 && !(await mayGoOn())) return;
      if (page.length > 0) await this.#redis.unlink(page);
    } while (cursor !== '0');
  }
}
