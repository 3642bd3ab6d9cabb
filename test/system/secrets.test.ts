/**
 * No secret shows anywhere: a whole system with known secrets runs at log level debug, things go wrong in it on purpose, and all
 * that it says, shows and leaves behind is searched: outputs, arguments and environments of the processes it started, Redis,
 * pages and answers, files that others can read.
 */
import { expect } from 'chai';
import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { aclRules } from '../../config/redis-commands.ts';
import { openRedis } from '../../config/redis.ts';
import { childEnvironment, loadConfig } from '../../config/schema.ts';
import { freePort } from '../support/ports.ts';
import { Workplace } from './cli-harness.ts';
import type { Running } from './cli-harness.ts';
import { eventually } from '../support/wait.ts';

const SECRETS = {
  'password of the queues': 'S3cretQueues-4f1b7c',
  'password of the exchange': 'S3cretExchange-92ae01',
  'token of the API': 'S3cretApiToken-77d0c2e9',
  'token of the store': 'S3cretStoreToken-0b6e55aa',
  'password that is wrong': 'Wr0ngPassword-8d1c',
  'token that is wrong': 'Wr0ngToken-5e4f3a2b1c',
};

/** Processes below `pid`, with their arguments and what their environment was when they began. */
function descendants(pid: number): { pid: number; arguments: string; environment: string }[] {
  const parents = new Map<number, number>();
  for (const name of readdirSync('/proc').filter((each) => /^\d+$/.test(each))) {
    try {
      parents.set(Number(name), Number(/^PPid:\s+(\d+)$/m.exec(readFileSync(`/proc/${name}/status`, 'utf8'))![1]));
    } catch (error) {
      expect((error as NodeJS.ErrnoException).code).to.be.oneOf(['ENOENT', 'ESRCH']); // it ended meanwhile
    }
  }
  const below = [...parents.keys()].filter((each) => {
    for (let at = parents.get(each); at !== undefined && at > 1; at = parents.get(at)) if (at === pid) return true;
    return false;
  });
  return below.map((each) => ({ pid: each, arguments: readFileSync(`/proc/${each}/cmdline`, 'utf8'), environment: readFileSync(`/proc/${each}/environ`, 'utf8') }));
}

describe('secrets', function () {
  this.timeout(180_000);
  const place = new Workplace();
  const redisAt = mkdtempSync(join(tmpdir(), 'nn-secrets-redis-'));
  const admin = 'admin-of-the-test';
  const heard = new Map<string, string>();
  let redis: ChildProcess | undefined;
  let redisPort: number;
  let apiPort: number;
  let orchestrator: Running;
  let worker: Running;

  const { 'password of the queues': password, 'password of the exchange': exchangePassword, 'token of the API': token, 'token of the store': storeToken } = SECRETS;
  const env = (changes: NodeJS.ProcessEnv = {}): { env: NodeJS.ProcessEnv; timeoutMs: number } => ({
    timeoutMs: 170_000,
    env: {
      CUDA_NN_LOG: 'debug', CUDA_NN_REDIS_URL: `redis://nn:${password}@127.0.0.1:${redisPort}`, CUDA_NN_EXCHANGE_URL: `redis://exchange:${exchangePassword}@127.0.0.1:${redisPort}`,
      CUDA_NN_TOKEN: token, CUDA_NN_STORE_TOKEN: storeToken, CUDA_NN_PORT: String(apiPort), CUDA_NN_HEARTBEAT_MS: '200', CUDA_NN_REDIS_CONNECT_TIMEOUT_MS: '2000',
      CUDA_NN_REQUEST_TIMEOUT_MS: '5000', CUDA_NN_DRAIN_MS: '2000', ...changes,
    },
  });
  const startRedis = async (): Promise<void> => {
    redis = spawn('redis-server', [join(redisAt, 'redis.conf')], { stdio: 'ignore' });
    const connection = openRedis(`redis://:${admin}@127.0.0.1:${redisPort}`, loadConfig(), 'blocking');
    await connection.ping();
    for (const [name, secret] of [['nn', password], ['exchange', exchangePassword]] as const) await connection.call('ACL', 'SETUSER', name, 'reset', 'on', `>${secret}`, ...aclRules('nn').split(' '));
    connection.disconnect();
  };
  const stopRedis = async (): Promise<void> => {
    const gone = new Promise((resolve) => redis?.once('exit', resolve));
    redis?.kill('SIGKILL');
    await gone;
  };
  /** Runs a command, whatever becomes of it, and keeps what it said. */
  const run = async (name: string, args: readonly string[], changes: NodeJS.ProcessEnv = {}): Promise<number | null> => {
    const { code, stdout, stderr } = await place.run(args, env(changes));
    heard.set(name, stdout + stderr);
    return code;
  };
  const ask = async (path: string, init: RequestInit = {}, bearer: string = token): Promise<Response> => {
    const answer = await fetch(`http://127.0.0.1:${apiPort}${path}`, { redirect: 'manual', ...init, headers: { authorization: `Bearer ${bearer}`, ...(init.headers as Record<string, string>) } });
    const copy = answer.clone();
    heard.set(`${init.method ?? 'GET'} ${path} (${bearer === token ? 'right' : 'wrong'} token)`, JSON.stringify([...answer.headers]) + (await answer.text()));
    return copy;
  };
  const search = (where: string, text: string): string[] => Object.entries(SECRETS).flatMap(([what, secret]) => (text.includes(secret) ? [`${where}: the ${what}`] : []));

  before(async () => {
    [redisPort, apiPort] = [await freePort(), await freePort()];
    mkdirSync(join(redisAt, 'data'));
    const lines = `bind 127.0.0.1\nport ${redisPort}\nrequirepass ${admin}\ndir ${join(redisAt, 'data')}\nappendonly yes\nsave ""\nmaxmemory-policy noeviction\n`;
    writeFileSync(join(redisAt, 'redis.conf'), lines, { mode: 0o600 });
    await startRedis();
    await place.prepareData();
    orchestrator = place.start(['orchestrator'], env());
    await orchestrator.saw('orchestrator  ready');
    worker = place.start(['worker', '--gpus', 'none', '--count', '2'], env({ CUDA_NN_TOKEN: '', CUDA_NN_STORE_URL: `http://127.0.0.1:${apiPort}` }));
    await worker.saw('on ');
  });
  after(async () => {
    place.remove();
    await stopRedis();
    rmSync(redisAt, { recursive: true, force: true });
  });

  it('a run goes through with a worker that dies and a Redis that goes away, and commands fail in every way', async () => {
    place.writeSpec('long', { steps: 100_000, checkpoint: { every: 20, keep: 1 }, parallelism: 2 });
    expect(await run('train', ['train', 'long.json'])).to.equal(0);
    await eventually('steps', async () => ((JSON.parse(await (await ask('/api/runs/long')).text()) as { step: number }).step > 5 ? true : undefined), 60_000);
    const victim = descendants(worker.child.pid!).find(({ arguments: args }) => args.startsWith('cuda-nn worker'))!;
    process.kill(victim.pid, 'SIGKILL');
    await worker.saw('started again');
    await stopRedis();
    expect(await run('Redis away', ['runs'])).to.equal(4);
    await ask('/api/runs');
    await startRedis();
    await eventually('more steps', async () => ((JSON.parse(await (await ask('/api/runs/long')).text()) as { step?: number }).step! > 20 ? true : undefined), 90_000).catch(async (error: Error) => {
      throw new Error(`${error.message}; the run is: ${await (await ask('/api/runs/long')).text()}`);
    });

    const { 'password that is wrong': wrong, 'token that is wrong': wrongToken } = SECRETS;
    const urlOf = (secret: string, port = redisPort): string => `redis://nn:${secret}@127.0.0.1:${port}`;
    for (const args of [['doctor', '--json'], ['worker', '--gpus', 'none']]) expect(await run(`wrong password: ${args[0]}`, args, { CUDA_NN_REDIS_URL: urlOf(wrong) })).to.equal(4);
    expect(await run('wrong password of the exchange', ['orchestrator', '--no-server'], { CUDA_NN_EXCHANGE_URL: urlOf(wrong) })).to.equal(4);
    expect(await run('wrong store token', ['worker', '--gpus', 'none'], { CUDA_NN_STORE_URL: `http://127.0.0.1:${apiPort}`, CUDA_NN_STORE_TOKEN: wrongToken })).to.equal(4);
    expect(await run('no store', ['worker', '--gpus', 'none'], { CUDA_NN_STORE_URL: 'http://127.0.0.1:9' })).to.equal(4);
    expect(await run('secret in the store’s URL', ['worker', '--gpus', 'none'], { CUDA_NN_STORE_URL: `http://me:${wrong}@127.0.0.1:9` })).to.equal(2);
    expect(await run('nobody there', ['runs'], { CUDA_NN_REDIS_URL: urlOf(wrong, 9) })).to.equal(4);
    for (const [at, malformed] of [`redis//:${wrong}@x`, `redis://:${wrong}/slash@127.0.0.1:1`, `http://:${wrong}@x`, `redis://:p@${wrong}@127.0.0.1:9`, `:${wrong}`].entries()) {
      expect(await run(`malformed ${at}`, ['doctor'], { CUDA_NN_REDIS_URL: malformed })).to.be.oneOf([2, 4]);
    }
    expect(await run('token too short', ['orchestrator', '--host', '0.0.0.0'], { CUDA_NN_TOKEN: wrong.slice(0, 9), CUDA_NN_STORE_TOKEN: wrongToken })).to.equal(2);
    for (const args of [['status', 'long'], ['logs', 'long'], ['doctor']]) await run(args.join(' '), args);
    await run('eval of what is not there', ['eval', 'nowhere', '--data', 'train.tokens']);

    for (const path of ['/', '/page.js', '/page.css', '/login', '/healthz', '/metrics', '/api/runs', '/api/runs/long', '/api/runs/long/curve', '/api/runs/nothing', '/api/workers', '/api/queues',
      '/queues', '/queues/api/queues', '/store', '/store/runs/long', '/store/runs/long/train', '/store/runs/long/secret', '/nowhere']) {
      await ask(path);
      await ask(path, {}, wrongToken);
    }
    await ask('/login', { method: 'POST', body: new URLSearchParams({ token }) });
    await ask('/login', { method: 'POST', body: new URLSearchParams({ token: wrongToken }) });
    await ask('/api/runs', { method: 'POST', body: JSON.stringify({ name: token }), headers: { 'content-type': 'application/json' } }, wrongToken);
    expect(await run('cancel', ['cancel', 'long'])).to.equal(0);
  });

  it('processes show none in their arguments, and children get none in their environment', async () => {
    await eventually('both workers', () => (descendants(worker.child.pid!).length >= 2 ? true : undefined), 60_000);
    const found: string[] = [];
    for (const part of [orchestrator, worker]) {
      found.push(...search('arguments', readFileSync(`/proc/${part.child.pid}/cmdline`, 'utf8')));
      for (const { pid, arguments: args, environment } of descendants(part.child.pid!)) found.push(...search(`arguments of ${pid} ${args}`, args), ...search(`environment of ${args}`, environment));
    }
    expect(found).to.deep.equal([]);
    const given = { CUDA_NN_TOKEN: 'x', CUDA_NN_STORE_TOKEN: 'x', CUDA_NN_REDIS_URL: 'x', CUDA_NN_EXCHANGE_URL: 'x', CUDA_NN_HOME: 'x', PATH: 'x' };
    expect(childEnvironment(given)).to.deep.equal({ CUDA_NN_HOME: 'x', PATH: 'x' });
  });

  it('Redis holds none: records, events, jobs, results', async () => {
    const connection = openRedis(`redis://:${admin}@127.0.0.1:${redisPort}`, loadConfig(), 'command');
    const names = await connection.keys('*');
    expect(names.length).to.be.above(5);
    const found: string[] = [];
    for (const name of names) {
      const dump: Record<string, () => Promise<unknown>> = {
        string: () => connection.get(name), hash: () => connection.hgetall(name), list: () => connection.lrange(name, 0, -1), set: () => connection.smembers(name),
        zset: () => connection.zrange(name, '0', '-1'), stream: () => connection.xrange(name, '-', '+'),
      };
      found.push(...search(name, `${name} ${JSON.stringify(await dump[await connection.type(name)]?.())}`));
    }
    connection.disconnect();
    expect(found).to.deep.equal([]);
  });

  it('nothing that was said, answered or left in a file shows one', async () => {
    for (const [name, part] of [['orchestrator', orchestrator], ['worker', worker]] as const) {
      part.child.kill('SIGTERM');
      const { stdout, stderr } = await part.ended;
      heard.set(name, stdout + stderr);
    }
    expect(heard.get('orchestrator')!.length).to.be.above(500);
    expect([...heard].flatMap(([where, text]) => search(where, text))).to.deep.equal([]);
    const files = readdirSync(place.directory, { recursive: true, encoding: 'utf8' }).map((name) => join(place.directory, name)).filter((path) => statSync(path).isFile());
    expect(files.length).to.be.above(5);
    const found = files.flatMap((path) => search(path, readFileSync(path, 'latin1')).filter(() => (statSync(path).mode & 0o077) !== 0));
    expect(found).to.deep.equal([]);
  });
});
