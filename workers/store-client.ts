/**
 * A worker's end of the store (protocol: config/store.ts): fetches files and delivers checkpoints over HTTP, streaming, each
 * carried on where it stood after a break. A transfer of which no byte moves for timeoutMs is begun anew; an outage is waited
 * for with growing pauses up to outageMs. Knows neither cache nor jobs. Called by store.ts.
 */
import { createReadStream } from 'node:fs';
import { mkdir, open, rm, stat } from 'node:fs/promises';
import { request as httpRequest } from 'node:http';
import type { IncomingMessage } from 'node:http';
import { request as httpsRequest } from 'node:https';
import { dirname, join } from 'node:path';
import type { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { setTimeout as pause } from 'node:timers/promises';
import type { CheckpointName } from '../config/branches.ts';
import { NnError, errorCode, fromErrorRecord } from '../config/errors.ts';
import type { ErrorRecord } from '../config/errors.ts';
import type { Config } from '../config/schema.ts';
import { OFFSET_HEADER, greeting, hashing, listing, runPaths, uploadState } from '../config/store.ts';
import type { Listing, Role, RunPaths } from '../config/store.ts';
import { untrusted } from '../config/tls.ts';
import { fileError } from '../data/files.ts';
import { sha256File } from '../data/listing.ts';
import type { Manifest } from '../data/manifest.ts';

const FIRST_PAUSE_MS = 100;
const LONGEST_PAUSE_MS = 2_000;
/** How often a file is fetched or sent again because what arrived was not what was sent. */
const ROUNDS = 3;
/** Bytes of an answer that is not a file. */
const ANSWER_BYTES = 4 << 20;

/** An attempt that may succeed when it is made again. */
class Interrupted extends Error {}

interface Ask {
  readonly method: 'GET' | 'HEAD' | 'PUT' | 'PATCH' | 'POST';
  readonly path: string;
  readonly headers?: Readonly<Record<string, string | number>>;
  readonly json?: unknown;
  readonly body?: Readable;
  readonly signal?: AbortSignal | undefined;
}

/** Something under way: gives up on the signal; `moved` says that it gets on, by so many bytes, which makes an outage begin anew. */
interface Attempt {
  readonly signal: AbortSignal | undefined;
  readonly moved: (bytes: number) => void;
}

export class StoreClient {
  readonly #base: URL;
  readonly #token: string;
  readonly #timeoutMs: number;
  readonly #outageMs: number;
  readonly #pieceBytes: number;
  readonly #slots: Slots;
  readonly #log: (message: string) => void;

  /** Throws USAGE for an address that is none. `log` hears of interruptions. */
  constructor(config: Config, log: (message: string) => void) {
    const { url, token, timeoutMs, outageMs, pieceBytes, concurrency } = config.store;
    this.#base = storeAddress(url);
    this.#token = token === '' ? config.server.token : token;
    this.#timeoutMs = timeoutMs;
    this.#outageMs = outageMs;
    this.#pieceBytes = pieceBytes;
    this.#slots = new Slots(concurrency);
    this.#log = log;
  }

  /** Asks once whether the store is there and takes the token. Throws STORE_UNAVAILABLE, STORE_AUTH. */
  async check(): Promise<void> {
    try {
      greeting.parse(await this.#json({ method: 'GET', path: '' }));
    } catch (error) {
      if (errorCode(error) === 'STORE_AUTH') throw error;
      throw new NnError('STORE_UNAVAILABLE', `the store at ${this.#base.origin} cannot be reached (${(error as Error).message}); is \`cuda-nn orchestrator\` running there?`, {}, error);
    }
  }

  /** Where the files of a run lie on the orchestrator's host. Throws RUN_NOT_FOUND, STORE_*. */
  paths(run: string, signal?: AbortSignal): Promise<RunPaths> {
    return this.#persist(`the files of run ${run}`, signal, async () => runPaths.parse(await this.#json({ method: 'GET', path: runPath(run), signal })));
  }

  /** What a role of a run holds; waits while the store computes digests. Throws RUN_NOT_FOUND, FILE_NOT_FOUND, CHECKPOINT_INVALID, STORE_*. */
  listing(run: string, role: Role, signal?: AbortSignal): Promise<Listing> {
    return this.#persist(`${role} of run ${run}`, signal, async ({ moved }) => {
      for (;;) {
        const answer = await this.#json({ method: 'GET', path: `${runPath(run)}/${role}`, signal });
        if (!hashing.safeParse(answer).success) return listing.parse(answer);
        moved(0);
        await rest(FIRST_PAUSE_MS, signal);
      }
    });
  }

  /**
   * Completes the file at `path` (what is there of it is kept) and verifies it. Returns the bytes that had to be fetched.
   * Throws STORE_UNAVAILABLE, also when what arrives is damaged each time; DISK_FULL, CANCELLED.
   */
  async download(run: string, role: Role, file: { readonly bytes: number; readonly sha256: string }, path: string, signal?: AbortSignal): Promise<number> {
    await mkdir(dirname(path), { recursive: true });
    let fetched = 0;
    for (let round = 0; round < ROUNDS; round++) {
      await this.#slots.with(signal, () =>
        this.#persist(`${role} of run ${run}`, signal, async (attempt) => {
          await this.#fetch(`${runPath(run)}/${role}/${file.sha256}`, file.bytes, path, { ...attempt, moved: (bytes) => {
            fetched += bytes;
            attempt.moved(bytes);
          } });
          if ((await sizeOf(path)) < file.bytes) throw new Interrupted('the connection ended');
        }),
      );
      if ((await sha256File(path)) === file.sha256) return fetched;
      await rm(path, { force: true });
      this.#log(`${role} of run ${run} arrived damaged and is fetched again`);
    }
    throw new NnError('STORE_UNAVAILABLE', `${role} of run ${run}: what the store sends has another sha-256 than it says, ${ROUNDS} times; look at its disk`, { run });
  }

  /** Fetches what is missing of a file into it. An interruption leaves what has come. */
  async #fetch(path: string, bytes: number, into: string, { signal, moved }: Attempt): Promise<void> {
    const file = await open(into, 'a').catch((error: unknown) => Promise.reject(fileError(error, into) as Error));
    let at = (await file.stat()).size;
    const from = at;
    try {
      if (at > bytes) {
        await file.truncate(0);
        at = 0;
      }
      if (at < bytes) {
        const response = await this.#ask({ method: 'GET', path, headers: { range: `bytes=${at}-` }, signal });
        if (at > 0 && response.statusCode !== 206) throw new Interrupted('the store does not carry on where it stood');
        for await (const part of response as AsyncIterable<Buffer>) {
          await file.writeFile(part);
          at += part.length;
          moved(part.length);
        }
      }
      await file.sync();
    } catch (error) {
      if (at > from) this.#log(`${path.slice(1)} broke off at byte ${at} of ${bytes}`);
      throw fileError(error, into);
    } finally {
      await file.close();
    }
  }

  /** Delivers a checkpoint directory with this manifest; it is complete there when this returns. Throws STORE_*, DISK_FULL, CANCELLED. */
  async deliver(run: string, name: CheckpointName, epoch: number, directory: string, manifest: Manifest, signal?: AbortSignal): Promise<{ sentBytes: number }> {
    const path = `${runPath(run)}/${name}/upload`;
    const distinct = new Map(Object.entries(manifest.files).map(([file, { sha256, bytes }]) => [sha256, { file, bytes }]));
    let sentBytes = 0;
    let damaged = 0;
    await this.#persist(`checkpoint ${name} of run ${run}`, signal, async (attempt) => {
      let { upload, state } = uploadState.parse(await this.#json({ method: 'PUT', path, json: { epoch, manifest }, signal }));
      attempt.moved(0);
      if (state === 'open') {
        const files = [...distinct].map(([sha256, { file, bytes }]) =>
          this.#slots.with(signal, () => this.#persist(`${file} of checkpoint ${name} of run ${run}`, signal, async (sending) => {
            const sent = await this.#send(`${path}/${upload}/${sha256}`, join(directory, file), bytes, sending);
            sentBytes += sent;
            attempt.moved(sent);
          }, true)));
        for (const each of await Promise.allSettled(files)) if (each.status === 'rejected') throw each.reason;
      }
      while (state !== 'complete') {
        try {
          ({ state } = uploadState.parse(await this.#json({ method: state === 'open' ? 'POST' : 'PUT', path: state === 'open' ? `${path}/${upload}` : path, json: { epoch, manifest }, signal })));
          if (state === 'open') throw new Interrupted('what has arrived is not what was sent');
        } catch (error) {
          if (errorCode(error) !== 'CHECKPOINT_INVALID' || (error as NnError).context['resend'] !== true || ++damaged >= ROUNDS) throw error;
          throw new Interrupted((error as Error).message);
        }
        attempt.moved(0);
        if (state !== 'complete') await rest(FIRST_PAUSE_MS, signal);
      }
    });
    return { sentBytes };
  }

  /** Sends what the store lacks of a file, a piece at a time; returns how much it was. */
  async #send(path: string, from: string, bytes: number, { signal, moved }: Attempt): Promise<number> {
    const offsetOf = ({ headers }: IncomingMessage): number => Number(headers[OFFSET_HEADER]);
    const ended = async (response: IncomingMessage): Promise<number> => {
      await drained(response);
      return offsetOf(response);
    };
    const begin = await ended(await this.#ask({ method: 'HEAD', path, signal }));
    if (begin > 0 && begin < bytes) this.#log(`${path.slice(1)} goes on from byte ${begin} of ${bytes}`);
    for (let at = begin; at < bytes; ) {
      const length = Math.min(this.#pieceBytes, bytes - at);
      const body = createReadStream(from, { start: at, end: at + length - 1 });
      body.on('data', (part) => moved(part.length));
      const end = await ended(await this.#ask({ method: 'PATCH', path, headers: { [OFFSET_HEADER]: at, 'content-length': length, 'content-type': 'application/octet-stream' }, body, signal }));
      if (!(end > at)) throw new Interrupted('the store took nothing');
      at = end;
    }
    return Math.max(0, bytes - begin);
  }

  /** Does `work` until it succeeds: what may be cured by time is tried again, with growing pauses, for at most outageMs without a byte. */
  async #persist<Value>(what: string, signal: AbortSignal | undefined, work: (attempt: Attempt) => Promise<Value>, oncePerBegin = false): Promise<Value> {
    let stoodSinceMs = performance.now();
    let pauseMs = FIRST_PAUSE_MS;
    const moved = (): void => {
      stoodSinceMs = performance.now();
      pauseMs = FIRST_PAUSE_MS;
    };
    for (;;) {
      try {
        return await work({ signal, moved });
      } catch (error) {
        if (signal?.aborted === true) throw new NnError('CANCELLED', `${what}: given up, because its job is`, {}, error);
        const code = errorCode(error);
        const begun = code === 'STORE_UNAVAILABLE' && (error as NnError).context['begin'] === true;
        if (!isInterruption(error) || (oncePerBegin && begun)) throw error;
        if (performance.now() - stoodSinceMs > this.#outageMs) {
          throw new NnError('STORE_UNAVAILABLE', `${what}: the store at ${this.#base.origin} was away for more than ${this.#outageMs} ms (${(error as Error).message})`, {}, error);
        }
        this.#log(`${what}: ${(error as Error).message}; tried again in ${pauseMs} ms`);
      }
      await rest(pauseMs, signal);
      pauseMs = Math.min(LONGEST_PAUSE_MS, pauseMs * 2);
    }
  }

  /** One request whose answer is JSON. */
  async #json(ask: Ask): Promise<unknown> {
    const response = await this.#ask(ask);
    return JSON.parse(await textOf(response)) as unknown;
  }

  /** One request; its answer, of which only the head has come. Throws what the store says, or Interrupted. */
  async #ask({ method, path, headers = {}, json, body, signal }: Ask): Promise<IncomingMessage> {
    const url = new URL(this.#base.href + path);
    const text = json === undefined ? undefined : JSON.stringify(json);
    const send = url.protocol === 'https:' ? httpsRequest : httpRequest;
    const response = await new Promise<IncomingMessage>((resolve, reject) => {
      const request = send(url, {
        method,
        headers: {
          ...(this.#token === '' ? {} : { authorization: `Bearer ${this.#token}` }),
          ...(text === undefined ? {} : { 'content-type': 'application/json', 'content-length': Buffer.byteLength(text) }),
          ...headers,
        },
        ...(signal === undefined ? {} : { signal }),
      });
      // Also while the answer streams in: without a byte for so long, both sides of the connection are given up.
      request.setTimeout(this.#timeoutMs, () => request.destroy(new Interrupted(`no byte moved for ${this.#timeoutMs} ms`)));
      request.once('error', (error: Error) => reject(error instanceof Interrupted ? error : broken(error, this.#base.origin)));
      request.once('response', resolve);
      if (body === undefined) request.end(text);
      else pipeline(body, request).catch((error: Error) => request.destroy(error));
    });
    const { statusCode = 0 } = response;
    if (statusCode < 300) return response;
    const answer = method === 'HEAD' ? '' : await textOf(response);
    if (method === 'HEAD') response.resume();
    throw refusal(statusCode, answer, this.#base.origin);
  }
}

/** What a connection that failed comes to: STORE_AUTH where the other side is not trusted, else something that time may cure. */
function broken(error: Error, origin: string): Error {
  const code = untrusted(error);
  if (code === null) return new Interrupted(error.message, { cause: error });
  const advice = 'name its authority in NODE_EXTRA_CA_CERTS, use the host name that its certificate has, or http:// for a store without TLS';
  return new NnError('STORE_AUTH', `no TLS with the store at ${origin} (${code}: ${error.message.split('\n')[0]!.trim()}); ${advice}`, { code }, error);
}

/** The address as a base to which paths are added. Throws USAGE. */
export function storeAddress(url: string): URL {
  const parsed = URL.canParse(url) ? new URL(url) : null;
  if (parsed === null || (parsed.protocol !== 'http:' && parsed.protocol !== 'https:') || parsed.username !== '' || parsed.password !== '') {
    throw new NnError('USAGE', 'CUDA_NN_STORE_URL must be http://HOST:PORT or https://HOST:PORT; the token goes into CUDA_NN_STORE_TOKEN');
  }
  return new URL(`${parsed.origin}${parsed.pathname.replace(/\/+$/, '')}/store`);
}

const runPath = (run: string): string => `/runs/${encodeURIComponent(run)}`;

/** What the store refused, as the error that it is. */
function refusal(status: number, text: string, origin: string): Error {
  if (status === 401 || status === 403) {
    return new NnError('STORE_AUTH', `the store at ${origin} refuses the token; set CUDA_NN_STORE_TOKEN (or CUDA_NN_TOKEN) to that of the orchestrator`);
  }
  let record: Partial<ErrorRecord> | undefined;
  try {
    record = (JSON.parse(text) as { error?: Partial<ErrorRecord> }).error;
  } catch (error) {
    return new Interrupted(`status ${status}, and no answer of the store (${(error as Error).message})`);
  }
  const { code, message = `status ${status}`, context = {} } = record ?? {};
  if (code === undefined || code === 'BUG') return new Interrupted(message);
  return fromErrorRecord({ code, message, context });
}

/** Failures that another attempt may not have: broken connections, and a store, or the Redis behind it, that is busy or away. */
function isInterruption(error: unknown): boolean {
  if (error instanceof Interrupted) return true;
  const code = errorCode(error);
  if (code !== undefined) return code === 'STORE_UNAVAILABLE' || code === 'REDIS_UNAVAILABLE' || code === 'TIMEOUT';
  return ['ECONNRESET', 'EPIPE', 'ECONNREFUSED', 'ERR_STREAM_PREMATURE_CLOSE'].includes((error as NodeJS.ErrnoException).code ?? '') || error instanceof SyntaxError;
}

async function textOf(response: IncomingMessage): Promise<string> {
  let text = '';
  for await (const part of response.setEncoding('utf8') as AsyncIterable<string>) {
    text += part;
    if (text.length > ANSWER_BYTES) throw new Interrupted('an answer that is too long');
  }
  return text;
}

const drained = async (response: IncomingMessage): Promise<void> => void (await textOf(response));

const sizeOf = async (path: string): Promise<number> => (await stat(path)).size;

/** A pause that the signal ends: with CANCELLED. */
async function rest(milliseconds: number, signal: AbortSignal | undefined): Promise<void> {
  await pause(milliseconds, undefined, signal === undefined ? {} : { signal }).catch((error: unknown) => {
    throw new NnError('CANCELLED', 'the transfer was given up, because its job is', {}, error);
  });
}

/** At most so many at once; the others wait in order. */
class Slots {
  #free: number;
  readonly #waiting: (() => void)[] = [];

  constructor(count: number) {
    this.#free = count;
  }

  async with<Value>(signal: AbortSignal | undefined, work: () => Promise<Value>): Promise<Value> {
    if (this.#free > 0) this.#free--;
    else await new Promise<void>((resolve) => this.#waiting.push(resolve));
    try {
      if (signal?.aborted === true) throw new NnError('CANCELLED', 'the transfer was given up, because its job is');
      return await work();
    } finally {
      const next = this.#waiting.shift();
      if (next === undefined) this.#free++;
      else next();
    }
  }
}
