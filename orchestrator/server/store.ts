/**
 * The store over HTTP: gives workers without this file system the files of runs, and takes the checkpoints they write
 * (protocol: config/store.ts). Streams, answers ranges, and bounds how much goes on at once; who may ask is access.ts's
 * business, what lies where run-files.ts's. A request names run, role and sha-256, and nothing of it becomes a path.
 */
import { constants } from 'node:fs';
import { open } from 'node:fs/promises';
import type { FileHandle } from 'node:fs/promises';
import type { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify';
import type { CheckpointName } from '../../config/branches.ts';
import { NnError } from '../../config/errors.ts';
import { TERMINAL_PHASES } from '../../config/messages.ts';
import type { RunSpec } from '../../config/run-spec.ts';
import type { Config } from '../../config/schema.ts';
import { OFFSET_HEADER, STORE_PROTOCOL, beginUpload, isCheckpoint, roleOf } from '../../config/store.ts';
import type { Role } from '../../config/store.ts';
import { fileError } from '../../data/files.ts';
import type { Client } from '../client.ts';
import { RunFiles } from '../run-files.ts';
import { Uploads } from '../uploads.ts';

/** Bytes that the store has moved since this process began; /metrics shows them. */
export interface StoreCounters {
  sentBytes: number;
  receivedBytes: number;
}

/** How long a request waits for files to be hashed before it is told to ask again. */
const HASHING_MS = 5_000;
const PREFIX = '/store';
const RUN_NAME = /^[a-z0-9][a-z0-9._-]{0,63}$/;

interface ByRole {
  Params: { run: string; role: string };
}
interface ByFile {
  Params: { run: string; role: string; sha256: string };
}
interface ByUpload {
  Params: { run: string; role: string; id: string; sha256: string };
}

/** Whether a request is for the store, where the store's own token is good. */
export const isStorePath = (path: string): boolean => path === PREFIX || path.startsWith(`${PREFIX}/`);

export function store(app: FastifyInstance, client: Client, config: Config, runs: string): StoreCounters {
  const files = new RunFiles(runs);
  const uploads = new Uploads(runs, config.store);
  const counters: StoreCounters = { sentBytes: 0, receivedBytes: 0 };
  let moving = 0;
  const moved = async <Value>(work: () => Promise<Value>): Promise<Value> => {
    if (moving >= config.store.transfers) throw new NnError('STORE_UNAVAILABLE', `${config.store.transfers} files are on their way already; try again later`);
    moving++;
    try {
      return await work();
    } finally {
      moving--;
    }
  };

  /** Throws RUN_NOT_FOUND, also for what cannot be a run's name: that never becomes part of a path. */
  const specOf = async (run: string): Promise<RunSpec> => {
    if (!RUN_NAME.test(run)) throw new NnError('RUN_NOT_FOUND', 'a run’s name is wanted');
    return client.run(run).spec();
  };

  app.addContentTypeParser('application/octet-stream', (_request, payload, done) => done(null, payload));

  app.get(PREFIX, () => ({ protocol: STORE_PROTOCOL }));
  app.get<{ Params: { run: string } }>(`${PREFIX}/runs/:run`, async ({ params: { run } }) => files.paths(run, await specOf(run)));

  app.get<ByRole>(`${PREFIX}/runs/:run/:role`, async ({ params: { run, role } }, reply) => {
    const listing = files.listing(run, await specOf(run), wantedRole(role));
    const found = await within(HASHING_MS, listing);
    return found ?? reply.status(202).send({ hashing: true });
  });

  app.get<ByFile>(`${PREFIX}/runs/:run/:role/:sha256`, async ({ params: { run, role, sha256 }, headers }, reply) => {
    const spec = await specOf(run);
    await moved(async () => {
      const { path, bytes } = await files.find(run, spec, wantedRole(role), wantedDigest(sha256));
      const from = rangeStart(headers.range, bytes);
      await send(reply, path, { from, bytes, sha256 }, config.store.timeoutMs, (count) => (counters.sentBytes += count));
    });
  });

  app.put<ByRole>(`${PREFIX}/runs/:run/:role/upload`, async ({ params: { run, role }, body }) => {
    const request = beginUpload.safeParse(body);
    if (!request.success) throw new NnError('MESSAGE_INVALID', `the delivery of ${role}: ${request.error.issues[0]!.message}`, { run });
    const { epoch, manifest } = request.data;
    await specOf(run);
    await requireCurrent(client, run, epoch);
    return uploads.begin(run, wantedCheckpoint(role), manifest);
  });
  app.head<ByUpload>(`${PREFIX}/runs/:run/:role/upload/:id/:sha256`, ({ params: { run, role, id, sha256 } }, reply) =>
    reply.header(OFFSET_HEADER, uploads.offset(run, wantedCheckpoint(role), id, wantedDigest(sha256))).send());
  const received = async ({ params: { run, role, id, sha256 }, headers, body, raw }: FastifyRequest<ByUpload>, reply: FastifyReply): Promise<FastifyReply> => {
    const offset = Number(headers[OFFSET_HEADER]);
    if (!Number.isSafeInteger(offset) || offset < 0) throw new NnError('MESSAGE_INVALID', `${OFFSET_HEADER}: a number of bytes is wanted`);
    raw.socket.setTimeout(config.store.timeoutMs, () => raw.destroy());
    const end = await moved(() => uploads.append(run, wantedCheckpoint(role), id, wantedDigest(sha256), offset, body as Readable, (count) => (counters.receivedBytes += count)));
    return reply.header(OFFSET_HEADER, end).status(204).send();
  };
  app.patch<ByUpload>(`${PREFIX}/runs/:run/:role/upload/:id/:sha256`, { bodyLimit: config.store.pieceBytes }, received);
  app.post<ByUpload>(`${PREFIX}/runs/:run/:role/upload/:id`, ({ params: { run, role, id } }) => uploads.finish(run, wantedCheckpoint(role), id));
  return counters;
}

/** Sends a file from byte `from` on. A reader that takes nothing for `timeoutMs` is given up. */
async function send(reply: FastifyReply, path: string, { from, bytes, sha256 }: { from: number; bytes: number; sha256: string }, timeoutMs: number, onBytes: (count: number) => void): Promise<void> {
  const file = await openFile(path);
  try {
    if ((await file.stat()).size !== bytes) throw new NnError('STORE_UNAVAILABLE', `${path}: changes while it is read`, { path });
    reply.hijack();
    const { raw } = reply;
    raw.socket?.setTimeout(timeoutMs, () => raw.destroy());
    raw.writeHead(from > 0 ? 206 : 200, {
      ...(reply.getHeaders() as Record<string, string>),
      'content-type': 'application/octet-stream',
      'content-length': bytes - from,
      etag: `"${sha256}"`,
      'accept-ranges': 'bytes',
      ...(from > 0 ? { 'content-range': `bytes ${from}-${bytes - 1}/${bytes}` } : {}),
    });
    if (from === bytes) return void raw.end();
    const contents = file.createReadStream({ start: from, end: bytes - 1, autoClose: false });
    contents.on('data', (part) => onBytes(part.length));
    await pipeline(contents, raw).catch((error: NodeJS.ErrnoException) => {
      // The reader went away, or stood still for too long: it will ask again.
      if (error.code !== 'ERR_STREAM_PREMATURE_CLOSE' && error.code !== 'ECONNRESET' && error.code !== 'EPIPE') raw.destroy(error);
    });
  } finally {
    await file.close();
  }
}

async function openFile(path: string): Promise<FileHandle> {
  try {
    return await open(path, constants.O_RDONLY);
  } catch (error) {
    throw fileError(error, path);
  }
}

/** What `work` gives within the time, else undefined; a failure of it is thrown only if it comes in time. */
async function within<Value>(milliseconds: number, work: Promise<Value>): Promise<Value | undefined> {
  work.catch(() => undefined);
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<undefined>((resolve) => {
    timer = setTimeout(() => resolve(undefined), milliseconds);
  });
  try {
    return await Promise.race([work, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** Throws CANCELLED for a delivery of a job that was given up, or of a run that is over: nobody waits for it. */
async function requireCurrent(client: Client, run: string, epoch: number): Promise<void> {
  const record = await client.run(run).record();
  if (record.epoch <= epoch && !TERMINAL_PHASES.includes(record.phase)) return;
  throw new NnError('CANCELLED', `run ${run} is ${record.phase} in epoch ${record.epoch}; a checkpoint of epoch ${epoch} is not taken any more`, { run });
}

function wantedRole(name: string): Role {
  const role = roleOf(name);
  if (role === null) throw new NnError('FILE_NOT_FOUND', `a run has no files in the role ${JSON.stringify(name)}`);
  return role;
}

function wantedCheckpoint(name: string): CheckpointName {
  const role = wantedRole(name);
  if (!isCheckpoint(role)) throw new NnError('MESSAGE_INVALID', `only checkpoints are delivered, not ${name}`);
  return role;
}

function wantedDigest(text: string): string {
  if (!/^[0-9a-f]{64}$/.test(text)) throw new NnError('MESSAGE_INVALID', 'a sha-256 in hex is wanted');
  return text;
}

/** The first byte that `Range: bytes=N-` asks for; 0 without it. Other ranges are not served. */
function rangeStart(header: string | undefined, bytes: number): number {
  if (header === undefined) return 0;
  const start = Number(/^bytes=(\d+)-$/.exec(header)?.[1] ?? Number.NaN);
  if (!Number.isSafeInteger(start) || start > bytes) throw new NnError('MESSAGE_INVALID', `Range: ${header}: only bytes=N- within the file is served`);
  return start;
}
