/**
 * The exchange: how a gradient travels from the worker that computed it to those that need it. This is the contract that
 * each way of travelling keeps (test/system/worker-exchange.test.ts is its conformance suite). It moves float32 tensors in
 * chunks under a key, and small texts; it knows neither runs nor replicas. Used by workers/replica.ts alone.
 *
 *   upload(key, tensor)      chunks <key>:0, <key>:1, ...       may be repeated: the same bits again change nothing
 *   seal(key, text)          the text under <key> itself, last  a reader that finds it may expect every chunk
 *   download(key, tensor)    every chunk, each checked          a missing or damaged one is GRADIENT_LOST
 */

/** Where the elements of an upload come from. `digest` names the bits of the whole tensor; every chunk is bound to it. */
export interface TensorSource {
  /** Elements. */
  readonly length: number;
  readonly digest: string;
  read(offset: number, into: Float32Array): void;
}

/** Where the elements of a download go. Chunks may arrive in any order; `from` is only valid during the call. */
export interface TensorSink {
  readonly length: number;
  readonly digest: string;
  write(offset: number, from: Float32Array): void;
}

export interface Exchange {
  /**
   * Puts every chunk of a tensor under `key`. It is not visible as complete before `seal`. Throws TIMEOUT or
   * REDIS_UNAVAILABLE, and whatever the heartbeat given at construction throws.
   */
  upload(key: string, tensor: TensorSource): Promise<void>;
  /** Writes the text of `key`: for a tensor the last act of publishing it. */
  seal(key: string, text: string): Promise<void>;
  /** The texts of keys, null where there is none. One round trip. */
  texts(keys: readonly string[]): Promise<(string | null)[]>;
  /** Whether every chunk of a tensor of `length` elements is there (not whether it is undamaged). */
  complete(key: string, length: number): Promise<boolean>;
  /**
   * Reads every chunk of a tensor. Throws GRADIENT_LOST when one is missing, damaged, or belongs to other bits than
   * `digest` names; the sink may have got some chunks by then.
   */
  download(key: string, tensor: TensorSink): Promise<void>;
  /** Deletes tensors of `length` elements, text first. What is not there is no error. */
  remove(keys: readonly string[], length: number): Promise<void>;
  /** Deletes every key that starts with `prefix`; returns how many. */
  removeAll(prefix: string): Promise<number>;
  close(): void;
}
