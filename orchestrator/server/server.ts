/**
 * The HTTP server: the verbs of the client library under /api, live events, Prometheus metrics, bull-board and the page. Binds
 * to loopback unless told otherwise; access.ts says who may. It holds no state of runs. Started by `cuda-nn up`.
 *
 *   GET  /                          the page             POST /login  {token}            a session cookie
 *   GET  /api/runs  /api/runs/:id   records              POST /api/runs  spec            queue a run
 *   GET  /api/runs/:id/events       server-sent events   POST /api/runs/:id/{pause,resume,cancel,retry}
 *   GET  /api/runs/:id/curve        loss by step         GET  /healthz  /metrics         liveness, Prometheus
 *   GET  /api/workers  /api/queues                       *    /queues                    bull-board
 *   *    /store                     files of runs and deliveries of checkpoints, for workers elsewhere (store.ts)
 */
import { resolve } from 'node:path';
import { createBullBoard } from '@bull-board/api';
import { BullMQAdapter } from '@bull-board/api/bullMQAdapter';
import { FastifyAdapter } from '@bull-board/fastify';
import fastify from 'fastify';
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify';
import type { Logger } from 'pino';
import { ERROR_KINDS, NnError, errorCode, toErrorRecord } from '../../config/errors.ts';
import type { RunSpecInput } from '../../config/run-spec.ts';
import type { Config } from '../../config/schema.ts';
import type { Client } from '../client.ts';
import { Access } from './access.ts';
import type { RequestFacts } from './access.ts';
import { Histories } from './history.ts';
import { LOGIN_HTML, PAGE_CSS, PAGE_HTML, PAGE_SCRIPT } from './page.ts';
import { prometheusText } from './prometheus.ts';
import { isStorePath, store } from './store.ts';
import type { StoreCounters } from './store.ts';

export interface Server {
  readonly url: string;
  stop(): Promise<void>;
}

const BODY_BYTES = 1 << 20;
const REQUEST_TIMEOUT_MS = 60_000;
/** Readers of live events at once; each has a connection to Redis. */
const MAX_STREAMS = 64;
const STREAM_HEARTBEAT_MS = 15_000;
/** Wrong tokens in a minute after which logins are refused until the next. */
const MAX_WRONG_TOKENS = 20;
const BOARD = '/queues';

const POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'";
/** bull-board sets styles on elements and has a <base>. */
const BOARD_POLICY = "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self' data:; base-uri 'self'; frame-ancestors 'none'";

const facts = (request: FastifyRequest): RequestFacts => ({
  method: request.method,
  host: request.headers.host,
  origin: request.headers.origin,
  fetchSite: request.headers['sec-fetch-site'],
  authorization: request.headers.authorization,
  cookie: request.headers.cookie,
});

/** What an error is in HTTP. */
function statusOf(error: unknown): number {
  const code = errorCode(error);
  if (code === undefined) return (error as { statusCode?: number }).statusCode ?? 500;
  if (code === 'RUN_NOT_FOUND') return 404;
  return { 2: 400, 3: 409, 4: 503, 5: 422, 6: 409 }[ERROR_KINDS[code].exitCode] ?? 500;
}

/** Throws USAGE for an address off loopback without a token, PORT_IN_USE. */
export async function startServer({ config, client, logger }: { config: Config; client: Client; logger?: Logger }): Promise<Server> {
  const { host, port, token } = config.server;
  const access = new Access(host, token, config.store.token);
  const app = fastify({ bodyLimit: BODY_BYTES, requestTimeout: REQUEST_TIMEOUT_MS, forceCloseConnections: true, routerOptions: { maxParamLength: 128 } });
  // A form of another site can send text/plain, but not JSON, without asking first.
  app.removeContentTypeParser('text/plain');
  guard(app, access);
  app.setErrorHandler((error, request, reply) => {
    const status = statusOf(error);
    if (status >= 500) logger?.warn({ ...toErrorRecord(error), url: request.url }, 'request failed');
    // A bug's message may hold anything; the log has it.
    const { code, message, context } = toErrorRecord(error);
    const shown = code === 'BUG' && status >= 500 ? { code, message: 'internal error; the log says more', context: {} } : { code: code === 'BUG' ? 'USAGE' : code, message, context };
    return reply.status(status).send({ error: shown });
  });
  pages(app, access);
  const runs = resolve(config.runs);
  api(app, client, new Histories(runs), store(app, client, config, runs));
  board(app, client);
  try {
    await app.listen({ host, port });
  } catch (error) {
    await app.close();
    if ((error as NodeJS.ErrnoException).code !== 'EADDRINUSE') throw error;
    throw new NnError('PORT_IN_USE', `port ${port} on ${host} is taken by another process; set CUDA_NN_PORT to another one, or to 0 for any free one`, { port }, error);
  }
  const address = app.server.address() as { port: number };
  const name = host === '0.0.0.0' || host === '::' ? 'localhost' : host.includes(':') ? `[${host}]` : host;
  return { url: `http://${name}:${address.port}`, stop: () => app.close() };
}

/** The rules of access.ts, and the headers that every answer has. */
function guard(app: FastifyInstance, access: Access): void {
  app.addHook('onRequest', async (request, reply) => {
    const path = request.url.split('?')[0]!;
    reply.headers({
      'content-security-policy': path.startsWith(BOARD) ? BOARD_POLICY : POLICY,
      'x-content-type-options': 'nosniff',
      'referrer-policy': 'no-referrer',
      'cross-origin-resource-policy': 'same-origin',
      'cache-control': 'no-store',
    });
    const here = access.fromHere(facts(request));
    if (!here.allowed) return reply.status(here.status).send({ error: { code: 'USAGE', message: here.reason, context: {} } });
    if (path === '/healthz' || path === '/login' || path === '/page.css') return;
    const known = isStorePath(path) ? access.knowsStore(facts(request)) : access.knows(facts(request));
    if (known.allowed) return;
    if (request.method === 'GET' && path === '/') return reply.redirect('/login');
    return reply.status(known.status).header('www-authenticate', 'Bearer').send({ error: { code: isStorePath(path) ? 'STORE_AUTH' : 'USAGE', message: known.reason, context: {} } });
  });
}

function pages(app: FastifyInstance, access: Access): void {
  const send = (type: string, text: string) => (_request: FastifyRequest, reply: FastifyReply) => reply.type(`${type}; charset=utf-8`).send(text);
  app.get('/', send('text/html', PAGE_HTML));
  app.get('/page.css', send('text/css', PAGE_CSS));
  app.get('/page.js', send('text/javascript', PAGE_SCRIPT));
  app.get('/favicon.ico', (_request, reply) => reply.status(204).send());
  app.get('/healthz', () => ({ ok: true }));
  app.get('/login', send('text/html', LOGIN_HTML));
  let wrong = 0;
  let minute = 0;
  app.addContentTypeParser('application/x-www-form-urlencoded', { parseAs: 'string' }, (_request, body, done) => done(null, Object.fromEntries(new URLSearchParams(body as string))));
  app.post('/login', (request, reply) => {
    const now = Math.floor(Date.now() / 60_000);
    if (now !== minute) [minute, wrong] = [now, 0];
    if (wrong >= MAX_WRONG_TOKENS) return reply.status(429).send({ error: { code: 'USAGE', message: 'too many wrong tokens; wait a minute', context: {} } });
    const { token } = (request.body ?? {}) as { token?: unknown };
    if (typeof token === 'string' && access.isToken(token)) return reply.header('set-cookie', access.sessionCookie()).redirect('/', 303);
    wrong++;
    return reply.redirect('/login?wrong', 303);
  });
}

function api(app: FastifyInstance, client: Client, histories: Histories, moved: StoreCounters): void {
  interface ById {
    Params: { id: string };
  }
  app.get('/api/runs', async () => ({ runs: await client.runs() }));
  app.get<ById>('/api/runs/:id', (request) => client.run(request.params.id).record());
  app.get<ById>('/api/runs/:id/curve', async (request) => histories.curve((await client.run(request.params.id).record()).run));
  app.get('/api/workers', async () => ({ workers: await client.workers() }));
  app.get('/api/queues', async () => ({ queues: await client.queues() }));
  app.get('/metrics', async (_request, reply) => {
    const [runs, workers, queues] = await Promise.all([client.runs(), client.workers(), client.queues()]);
    return reply.type('text/plain; version=0.0.4; charset=utf-8').send(prometheusText(runs, workers, queues, moved));
  });
  app.post('/api/runs', async (request, reply) => {
    const run = await client.train(request.body as RunSpecInput);
    return reply.status(201).header('location', `/api/runs/${run.id}`).send(await run.record());
  });
  for (const verb of ['pause', 'resume', 'cancel', 'retry'] as const) {
    app.post<ById>(`/api/runs/:id/${verb}`, async (request, reply) => {
      await client.run(request.params.id)[verb]();
      return reply.status(202).send({ run: request.params.id, asked: verb });
    });
  }
  let streams = 0;
  app.get<ById>('/api/runs/:id/events', async (request, reply) => {
    if (streams >= MAX_STREAMS) throw new NnError('TIMEOUT', `${MAX_STREAMS} readers follow events already; try again later`);
    const run = client.run(request.params.id);
    await run.record();
    streams++;
    reply.hijack();
    const { raw } = reply;
    const events = run.events();
    // `return` ends the loop below at its next turn; a reader that went away costs a second at most.
    raw.on('close', () => void events.return());
    const heartbeat = setInterval(() => raw.write(': \n\n'), STREAM_HEARTBEAT_MS);
    try {
      raw.writeHead(200, { ...(reply.getHeaders() as Record<string, string>), 'content-type': 'text/event-stream', 'cache-control': 'no-store', 'x-accel-buffering': 'no' });
      for await (const event of events) {
        if (!raw.write(`event: ${event.type}\ndata: ${JSON.stringify(event)}\n\n`) && !raw.destroyed) await new Promise<void>((go) => whenReady(raw, go));
        if (raw.destroyed) break;
      }
    } catch (error) {
      raw.write(`event: error\ndata: ${JSON.stringify(toErrorRecord(error))}\n\n`);
    } finally {
      streams--;
      clearInterval(heartbeat);
      raw.end();
    }
  });
}

/** A slow reader holds up its own events only, until it reads on or goes away. */
function whenReady(stream: NodeJS.WritableStream, go: () => void): void {
  stream.once('drain', go);
  stream.once('close', go);
}

/** bull-board over the shared queues and those of the live workers, looked up anew at each visit. */
function board(app: FastifyInstance, client: Client): void {
  const adapter = new FastifyAdapter();
  const { setQueues } = createBullBoard({ queues: [], serverAdapter: adapter, options: { uiConfig: { boardTitle: 'cuda-nn' } } });
  adapter.setBasePath(BOARD);
  let last: readonly unknown[] = [];
  const refresh = async (): Promise<void> => {
    const queues = await client.boardQueues();
    if (queues.length === last.length && queues.every((queue, index) => queue === last[index])) return;
    last = queues;
    setQueues(queues.map((queue) => new BullMQAdapter(queue as ConstructorParameters<typeof BullMQAdapter>[0], { allowRetries: false })));
  };
  app.register((scope, _options, done) => {
    scope.addHook('preHandler', refresh);
    scope.register(adapter.registerPlugin(), { prefix: BOARD });
    done();
  });
}
