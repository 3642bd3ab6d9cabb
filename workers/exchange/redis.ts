/**
 * The exchange over Redis: chunks of a tensor as binary strings, several under way at once, each with its own checksum. It
 * waits through an outage up to a bound, and it reuses its buffers: nothing is allocated for a step but what the client
 * library allocates for replies. Runs on the compute thread with a connection of its own; knows no runs.
 *
 * A chunk, little-endian:   0 magic 'NNX1' | 4 crc32 | 8 bytes of the payload | 12 index | 16 payload (float32)
 *
 * The checksum starts from the tensor's digest instead of zero, so that a chunk of other bits under the same key (from
 * another attempt that computed something else) does not pass, however undamaged it is.
 */
import { crc32 } from 'node:zlib';
import { NnError, errorCode } from '../../config/errors.ts';
import { openRedis } from '../../config/redis.ts';
import type { Redis } from '../../config/redis.ts';
import type { Config } from '../../config/schema.ts';
import type { Exchange, TensorSink, TensorSource } from './contract.ts';

const MAGIC = 0x3158_4e4e; // 'NNX1'
const HEADER_BYTES = 16;
/** Keys that one command may name. */
const KEYS_PER_COMMAND = 512;
/** Milliseconds between looks at a transfer under way. */
const TICK_MS = 100;

/** One chunk being moved: its buffer, and the payload seen as floats (aligned, unlike replies). */
interface Slot {
  readonly bytes: Buffer;
  readonly floats: Float32Array;
}

export interface RedisExchangeOptions {
  readonly url: string;
  readonly config: Config;
  /** Called while waiting and for every chunk: a sign of life; throws to give the transfer up. */
  readonly beat?: () => void;
}

export class RedisExchange implements Exchange {
  readonly #redis: Redis;
  readonly #beat: () => void;
  readonly #timeoutMs: number;
  readonly #outageMs: number;
  readonly #concurrency: number;
  /** Elements of a chunk. */
  readonly #chunkLength: number;
  #slots: Slot[] = [];
  #lastError: Error | undefined;

  constructor({ url, config, beat = () => undefined }: RedisExchangeOptions) {
    this.#beat = beat;
    this.#timeoutMs = config.exchange.timeoutMs;
    this.#outageMs = config.exchange.outageMs;
    this.#concurrency = config.exchange.concurrency;
    this.#chunkLength = Math.max(1, Math.floor(config.exchange.chunkBytes / 4));
    this.#redis = openRedis(url, config, 'blocking', (error) => {
      this.#lastError = error;
    });
  }

  async upload(key: string, tensor: TensorSource): Promise<void> {
    const seed = crc32(tensor.digest);
    await this.#eachChunk(tensor.length, async (index, offset, length, slot) => {
      const payload = slot.floats.subarray(0, length);
      tensor.read(offset, payload);
      const chunk = slot.bytes.subarray(0, HEADER_BYTES + length * 4);
      writeHeader(chunk, index, seed);
      await this.#answered(`upload of ${key}:${index}`, () => this.#redis.set(`${key}:${index}`, chunk));
    });
  }

  async download(key: string, tensor: TensorSink): Promise<void> {
    const seed = crc32(tensor.digest);
    await this.#eachChunk(tensor.length, async (index, offset, length, slot) => {
      const chunk = await this.#answered(`download of ${key}:${index}`, () => this.#redis.getBuffer(`${key}:${index}`));
      const problem = chunk === null ? 'is missing' : checkChunk(chunk, index, length * 4, seed);
      if (problem !== null) throw new NnError('GRADIENT_LOST', `chunk ${index} of ${key} ${problem}; the gradient must be computed again`, { key, index });
      // Replies come at any address; floats need one divisible by 4.
      const payload = slot.floats.subarray(0, length);
      chunk!.copy(slot.bytes, HEADER_BYTES, HEADER_BYTES);
      tensor.write(offset, payload);
    });
  }

  async seal(key: string, text: string): Promise<void> {
    await this.#answered(`write of ${key}`, () => this.#redis.set(key, text));
  }

  async texts(keys: readonly string[]): Promise<(string | null)[]> {
    const found: (string | null)[] = [];
    for (let first = 0; first < keys.length; first += KEYS_PER_COMMAND) {
      const some = keys.slice(first, first + KEYS_PER_COMMAND);
      found.push(...(await this.#answered(`read of ${some[0]}`, () => this.#redis.mget(...some))));
    }
    return found;
  }

  async complete(key: string, length: number): Promise<boolean> {
    const keys = this.#chunkKeys(key, length);
    for (let first = 0; first < keys.length; first += KEYS_PER_COMMAND) {
      const some = keys.slice(first, first + KEYS_PER_COMMAND);
      if ((await this.#answered(`search for ${key}`, () => this.#redis.exists(...some))) !== some.length) return false;
    }
    return true;
  }

  async remove(keys: readonly string[], length: number): Promise<void> {
    const all = [...keys, ...keys.flatMap((key) => this.#chunkKeys(key, length))];
    for (let first = 0; first < all.length; first += KEYS_PER_COMMAND) {
      const some = all.slice(first, first + KEYS_PER_COMMAND);
      await this.#answered(`removal of ${some[0]}`, () => this.#redis.unlink(...some));
    }
  }

  async removeAll(prefix: string): Promise<number> {
    const pattern = `${prefix.replace(/[\\*?[\]]/g, '\\$&')}*`;
    let cursor = '0';
    let removed = 0;
    do {
      const [next, keys] = await this.#answered(`search for ${prefix}`, () => this.#redis.scan(cursor, 'MATCH', pattern, 'COUNT', KEYS_PER_COMMAND));
      cursor = next;
      if (keys.length > 0) removed += await this.#answered(`removal of ${prefix}`, () => this.#redis.unlink(...keys));
    } while (cursor !== '0');
    return removed;
  }

  close(): void {
    this.#redis.disconnect();
    this.#slots = [];
  }

  #chunkKeys(key: string, length: number): string[] {
    return Array.from({ length: Math.ceil(length / this.#chunkLength) }, (_, index) => `${key}:${index}`);
  }

  /** Runs `move` for every chunk of a tensor, some at a time; the first failure stops the rest and is thrown when all have ended. */
  async #eachChunk(length: number, move: (index: number, offset: number, length: number, slot: Slot) => Promise<void>): Promise<void> {
    const count = Math.ceil(length / this.#chunkLength);
    const lanes = Math.min(this.#concurrency, count);
    while (this.#slots.length < lanes) this.#slots.push(newSlot(Math.min(this.#chunkLength, length)));
    let next = 0;
    let failure: { error: unknown } | undefined;
    const lane = async (number: number): Promise<void> => {
      while (next < count && failure === undefined) {
        const index = next++;
        const offset = index * this.#chunkLength;
        const size = Math.min(this.#chunkLength, length - offset);
        if (this.#slots[number]!.floats.length < size) this.#slots[number] = newSlot(size);
        try {
          this.#beat();
          await move(index, offset, size, this.#slots[number]!);
        } catch (error) {
          failure ??= { error };
        }
      }
    };
    await Promise.all(Array.from({ length: lanes }, (_, number) => lane(number)));
    if (failure === undefined) return;
    // A command that was given up may still be sent after a reconnection: its buffer must never carry other bits.
    this.#slots = [];
    throw failure.error;
  }

  /**
   * The answer to a command. While Redis is away it waits, for outageMs at most (REDIS_UNAVAILABLE); a connected Redis must
   * answer within timeoutMs (TIMEOUT), else the connection is taken for dead and opened anew.
   */
  #answered<Value>(what: string, command: () => Promise<Value>): Promise<Value> {
    return new Promise((resolve, reject) => {
      let silentMs = 0;
      let awayMs = 0;
      let lookedAt = performance.now();
      const timer = setInterval(() => {
        // Native calls between two looks block this thread; that time is nobody's silence.
        const elapsedMs = Math.min(performance.now() - lookedAt, 2 * TICK_MS);
        lookedAt = performance.now();
        const ready = this.#redis.status === 'ready';
        silentMs = ready ? silentMs + elapsedMs : 0;
        awayMs = ready ? 0 : awayMs + elapsedMs;
        try {
          this.#beat();
          if (silentMs > this.#timeoutMs) {
            this.#redis.disconnect(true);
            throw new NnError('TIMEOUT', `${what}: the exchange did not answer within ${this.#timeoutMs} ms`, { timeoutMs: this.#timeoutMs });
          }
          if (awayMs > this.#outageMs) {
            const why = this.#lastError?.message ?? 'no connection';
            throw new NnError('REDIS_UNAVAILABLE', `${what}: the exchange's Redis was away for more than ${this.#outageMs} ms (${why})`);
          }
        } catch (error) {
          clearInterval(timer);
          reject(error);
        }
      }, TICK_MS);
      command().then(
        (value) => {
          clearInterval(timer);
          resolve(value);
        },
        (error: Error) => {
          clearInterval(timer);
          reject(errorCode(error) === undefined ? refusal(what, error) : error);
        },
      );
    });
  }
}

const newSlot = (length: number): Slot => {
  const memory = new ArrayBuffer(HEADER_BYTES + length * 4);
  return { bytes: Buffer.from(memory), floats: new Float32Array(memory, HEADER_BYTES, length) };
};

function writeHeader(chunk: Buffer, index: number, seed: number): void {
  chunk.writeUInt32LE(MAGIC, 0);
  chunk.writeUInt32LE(crc32(chunk.subarray(HEADER_BYTES), seed), 4);
  chunk.writeUInt32LE(chunk.length - HEADER_BYTES, 8);
  chunk.writeUInt32LE(index, 12);
}

/** What is wrong with a chunk, or null. Pure. */
function checkChunk(chunk: Buffer, index: number, bytes: number, seed: number): string | null {
  if (chunk.length !== HEADER_BYTES + bytes) return `has ${chunk.length} bytes instead of ${HEADER_BYTES + bytes}`;
  if (chunk.readUInt32LE(0) !== MAGIC) return 'is of another format';
  if (chunk.readUInt32LE(8) !== bytes || chunk.readUInt32LE(12) !== index) return 'has the header of another chunk';
  if (chunk.readUInt32LE(4) !== crc32(chunk.subarray(HEADER_BYTES), seed)) return 'is damaged (its checksum differs)';
  return null;
}

function refusal(what: string, error: Error): NnError {
  // It did not at this worker's start: a server that has just been started anew may have yet to be told its users.
  if (/WRONGPASS|NOAUTH|NOPERM/.test(error.message)) return new NnError('REDIS_UNAVAILABLE', `${what}: the exchange's Redis now refuses the user or password`, {}, error);
  const full = /\bOOM\b/.test(error.message) ? '; it is out of memory, raise its maxmemory' : '';
  return new NnError('REDIS_UNAVAILABLE', `${what}: the exchange's Redis refused (${error.message})${full}`, {}, error);
}
