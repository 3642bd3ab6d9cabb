/**
 * The HTTP server over a real Redis with a fake worker: the verbs, live events, metrics, bull-board, and who is refused.
 */
import { request as httpRequest } from 'node:http';
import { Script } from 'node:vm';
import { expect } from 'chai';
import type { RunRecord } from '../../config/messages.ts';
import type { Config } from '../../config/schema.ts';
import { PAGE_CSS, PAGE_HTML, PAGE_SCRIPT } from '../../orchestrator/server/page.ts';
import { startServer } from '../../orchestrator/server/server.ts';
import type { Server } from '../../orchestrator/server/server.ts';
import { FakeCluster } from '../support/fake-cluster.ts';
import { until } from '../support/wait.ts';

const TOKEN = 'a-token-of-more-than-sixteen';

describe('orchestrator: HTTP server', function () {
  this.timeout(30_000);
  let cluster: FakeCluster;
  const servers: Server[] = [];
  before(async () => {
    cluster = await FakeCluster.start();
    await cluster.orchestrate();
    await cluster.work('w1', { shardMs: 2 });
  });
  after(() => cluster.stop());
  afterEach(async () => {
    await Promise.all(servers.splice(0).map((server) => server.stop()));
  });

  const serve = async (changes: Partial<Config['server']> = {}): Promise<Server> => {
    const config = { ...cluster.config, server: { ...cluster.config.server, ...changes } };
    const server = await startServer({ config, client: cluster.client });
    servers.push(server);
    return server;
  };

  /** fetch would not send another Host. */
  const raw = (url: string, headers: Record<string, string>, method = 'GET'): Promise<number> =>
    new Promise((resolve, reject) => {
      const request = httpRequest(url, { method, headers }, (reply) => {
        reply.resume();
        resolve(reply.statusCode!);
      });
      request.on('error', reject);
      request.end();
    });

  it('queues a run, follows its events, shows its record, curve and metrics', async () => {
    const { url } = await serve();
    const created = await fetch(`${url}/api/runs`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(cluster.spec('web')) });
    expect(created.status).to.equal(201);
    const stream = await (await fetch(`${url}/api/runs/web/events`)).text();
    const events = [...stream.matchAll(/^event: (\w+)$/gm)].map((match) => match[1]);
    expect(events.filter((type) => type === 'step').length).to.equal(20);
    expect(stream.trim().split('\n').at(-1)).to.match(/"phase":"completed"/);
    const record = (await (await fetch(`${url}/api/runs/web`)).json()) as RunRecord;
    expect(record).to.include({ phase: 'completed', step: 20 });
    const curve = (await (await fetch(`${url}/api/runs/web/curve`)).json()) as { steps: number[]; losses: number[] };
    expect(curve.steps.length).to.equal(20);
    const metrics = await (await fetch(`${url}/metrics`)).text();
    expect(metrics).to.include('nn_runs{phase="completed"} 1').and.to.include('nn_workers{state=');
    expect(await (await fetch(`${url}/api/queues`)).json()).to.have.nested.property('queues.train.active');
    expect(await (await fetch(`${url}/api/workers`)).json()).to.have.nested.property('workers[0].id', 'w1');
  });

  it('pauses and cancels, and says what is wrong in one line with a status', async () => {
    const { url } = await serve();
    const run = await cluster.client.train(cluster.spec('verbs', { steps: 5_000 }));
    await until('a step', async () => (await run.record()).step > 2);
    expect((await fetch(`${url}/api/runs/verbs/pause`, { method: 'POST' })).status).to.equal(202);
    await until('paused', async () => (await run.record()).phase === 'paused');
    expect((await fetch(`${url}/api/runs/verbs/cancel`, { method: 'POST' })).status).to.equal(202);
    await run.ended();
    expect((await fetch(`${url}/api/runs/verbs/retry`, { method: 'POST' })).status).to.equal(202);
    await until('running again', async () => (await run.record()).phase === 'running');
    await run.cancel();
    expect((await run.ended()).attempts.map(({ phase }) => phase)).to.deep.equal(['cancelled', 'cancelled']);
    const post = (body: unknown): Promise<Response> => fetch(`${url}/api/runs`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body) });
    for (const [reply, status, code] of [
      [await fetch(`${url}/api/runs/verbs/pause`, { method: 'POST' }), 409, 'RUN_STATE'],
      [await fetch(`${url}/api/runs/web/retry`, { method: 'POST' }), 409, 'RUN_STATE'],
      [await fetch(`${url}/api/runs/nobody`), 404, 'RUN_NOT_FOUND'],
      [await post({ ...cluster.spec('x'), colour: 'blue' }), 400, 'SPEC_INVALID'],
      [await post(cluster.spec('verbs')), 409, 'RUN_EXISTS'],
      [await post(cluster.spec('y', { data: { train: '/nowhere.tokens' } })), 409, 'FILE_NOT_FOUND'],
    ] as const) {
      expect(reply.status).to.equal(status);
      expect(await reply.json()).to.have.nested.property('error.code', code);
    }
  });

  it('serves a page that loads nothing from elsewhere, and bull-board', async () => {
    const { url } = await serve();
    const page = await fetch(url);
    expect(page.headers.get('content-security-policy')).to.include("default-src 'none'");
    expect(await page.text()).to.equal(PAGE_HTML);
    for (const text of [PAGE_HTML, PAGE_CSS, PAGE_SCRIPT]) expect(text.replaceAll(/http(:\/\/|%3A%2F%2F)www\.w3\.org/g, '')).not.to.match(/https?:\/\//);
    expect(() => new Script(PAGE_SCRIPT)).not.to.throw();
    const board = await fetch(`${url}/queues`);
    expect(board.status).to.equal(200);
    const listed = (await (await fetch(`${url}/queues/api/queues`)).json()) as { queues: { name: string }[] };
    expect(listed.queues.map(({ name }) => name)).to.include.members(['runs', 'train', 'eval', 'generate', 'train-w1']);
  });

  it('refuses names that were bent to loopback, and writes from other sites', async () => {
    const { url } = await serve();
    expect(await raw(`${url}/api/runs`, { host: 'evil.example' })).to.equal(421);
    expect(await raw(`${url}/api/runs`, { host: `localhost:${new URL(url).port}` })).to.equal(200);
    for (const headers of [{ origin: 'https://evil.example' }, { origin: 'null' }, { 'sec-fetch-site': 'cross-site' }] as Record<string, string>[]) {
      expect(await raw(`${url}/api/runs/web/cancel`, headers, 'POST')).to.equal(403);
      expect(await raw(`${url}/queues/api/queues/train/pause`, headers, 'PUT')).to.equal(403);
    }
    expect(await raw(`${url}/api/runs`, { 'content-type': 'text/plain' }, 'POST')).to.be.oneOf([400, 415]);
  });

  it('asks for the token wherever one is set; a login gets a cookie that is not the token', async () => {
    const { url } = await serve({ token: TOKEN });
    expect((await fetch(`${url}/healthz`)).status).to.equal(200);
    for (const path of ['/api/runs', '/metrics', '/queues', '/queues/api/queues', '/page.js', '/api/runs/web/events']) expect((await fetch(`${url}${path}`)).status, path).to.equal(401);
    expect((await fetch(`${url}/api/runs`, { headers: { authorization: `Bearer ${TOKEN}` } })).status).to.equal(200);
    expect((await fetch(`${url}/api/runs`, { headers: { authorization: `Bearer ${TOKEN}x` } })).status).to.equal(401);
    expect((await fetch(url, { redirect: 'manual' })).headers.get('location')).to.equal('/login');
    const login = (token: string): Promise<Response> => fetch(`${url}/login`, { method: 'POST', redirect: 'manual', body: new URLSearchParams({ token }) });
    expect((await login('wrong')).headers.get('set-cookie')).to.equal(null);
    const cookie = (await login(TOKEN)).headers.get('set-cookie')!;
    expect(cookie).to.include('HttpOnly').and.to.include('SameSite=Strict').and.not.to.include(TOKEN);
    expect((await fetch(`${url}/queues`, { headers: { cookie: cookie.split(';')[0]! } })).status).to.equal(200);
  });

  it('will not serve off loopback without a token, nor on a port that is taken', async () => {
    const failure = (changes: Partial<Config['server']>): Promise<unknown> => serve(changes).then(() => null, (error: unknown) => error);
    expect(await failure({ host: '0.0.0.0' })).to.have.property('code', 'USAGE');
    expect(await failure({ host: '0.0.0.0', token: 'short' })).to.have.property('code', 'USAGE');
    const { url } = await serve();
    expect(await failure({ port: Number(new URL(url).port) })).to.have.property('code', 'PORT_IN_USE');
  });
});
