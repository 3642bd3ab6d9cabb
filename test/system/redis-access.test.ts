/**
 * A Redis that is guarded: TLS with an authority of one's own, certificates on both sides, and an ACL user who may do what a run
 * needs and nothing else. Real servers, whole runs of preset `tiny`; and what is said when something does not fit.
 */
import { expect } from 'chai';
import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { NnError } from '../../config/errors.ts';
import type { RunRecord } from '../../config/messages.ts';
import { REDIS_COMMANDS, aclRules } from '../../config/redis-commands.ts';
import { checkRedis, openRedis } from '../../config/redis.ts';
import type { Redis } from '../../config/redis.ts';
import { loadConfig, packageRoot } from '../../config/schema.ts';
import { makeCertificates, whyNoCertificates } from '../support/certificates.ts';
import type { Certificates } from '../support/certificates.ts';
import { startCluster } from '../support/cluster.ts';
import { freePort } from '../support/ports.ts';
import { tinySpec } from '../support/tiny-runs.ts';
import { eventually } from '../support/wait.ts';

const ADMIN = 'admin-password';

/** A redis-server on free ports of 127.0.0.1, without and with TLS; `more` lines of configuration. */
class GuardedRedis {
  readonly directory = mkdtempSync(join(tmpdir(), 'nn-guarded-'));
  port = 0;
  tlsPort = 0;
  #child: ChildProcess | undefined;

  async start(more: readonly string[] = []): Promise<this> {
    [this.port, this.tlsPort] = [await freePort(), await freePort()];
    mkdirSync(join(this.directory, 'data'), { recursive: true });
    const conf = join(this.directory, 'redis.conf');
    const tls = more.some((line) => line.startsWith('tls-')) ? [`tls-port ${this.tlsPort}`] : [];
    const lines = ['bind 127.0.0.1', `port ${this.port}`, ...tls, `requirepass ${ADMIN}`, `dir ${join(this.directory, 'data')}`, 'save ""', 'maxmemory-policy noeviction', ...more, ''];
    writeFileSync(conf, lines.join('\n'));
    this.#child = spawn('redis-server', [conf], { stdio: 'ignore' });
    await eventually('redis-server', async () => {
      const redis = openRedis(this.admin, loadConfig({ redis: { connectTimeoutMs: 500 } }), 'command');
      try {
        return (await redis.ping().catch(() => undefined)) === undefined ? undefined : true;
      } finally {
        redis.disconnect();
      }
    });
    return this;
  }

  get admin(): string {
    return `redis://:${ADMIN}@127.0.0.1:${this.port}`;
  }

  /** The TLS address, under another name if wanted. */
  tls(host = '127.0.0.1'): string {
    return `rediss://:${ADMIN}@${host}:${this.tlsPort}`;
  }

  async stop(): Promise<void> {
    const child = this.#child;
    if (child !== undefined && child.exitCode === null) {
      const gone = new Promise((resolve) => child.once('exit', resolve));
      child.kill('SIGKILL');
      await gone;
    }
    rmSync(this.directory, { recursive: true, force: true });
  }
}

/** What checkRedis says of an address: an error, or null. */
const verdict = (url: string, redis: object = {}): Promise<NnError | null> =>
  checkRedis(url, loadConfig({ redis: { url, connectTimeoutMs: 3_000, ...redis } })).then(() => null, (error: NnError) => error);

/** A run on two workers, paused, resumed and evaluated on the way. */
async function wholeRun(redis: object): Promise<RunRecord> {
  const cluster = await startCluster({ workers: 2, settings: { redis, queue: { stalledIntervalMs: 500 } } });
  try {
    const run = await cluster.client.train(tinySpec(cluster, 'guarded', { parallelism: 2 }));
    for await (const event of run.events()) {
      if (event.type === 'step' && event.report.step === 10) await run.pause();
      if (event.type === 'phase' && event.phase === 'paused') break;
    }
    const [victim] = cluster.supervisor.workers();
    process.kill(victim!.pid, 'SIGKILL');
    await run.resume();
    const record = await run.wait();
    await cluster.client.eval({ checkpoint: record.checkpoint!.directory, data: join(cluster.directory, 'validation.tokens'), sequences: 2, sequenceLength: 32 });
    const other = await cluster.client.train(tinySpec(cluster, 'cancelled', { steps: 100_000 }));
    for await (const event of other.events()) if (event.type === 'step' && event.report.step === 3) await other.cancel();
    await cluster.client.queues();
    return record;
  } finally {
    await cluster.stop();
  }
}

describe('Redis over TLS', function () {
  this.timeout(90_000);
  let redis: GuardedRedis;
  let strict: GuardedRedis;
  let files: Certificates;

  before(async function () {
    const reason = whyNoCertificates();
    if (reason !== null) {
      console.error(`      skipped: ${reason}`);
      return this.skip();
    }
    redis = new GuardedRedis();
    strict = new GuardedRedis();
    files = makeCertificates(redis.directory, ['IP:127.0.0.1', 'DNS:redis.example']);
    const tls = [`tls-cert-file ${files.server.certificateFile}`, `tls-key-file ${files.server.keyFile}`, `tls-ca-cert-file ${files.caFile}`];
    await redis.start([...tls, 'tls-auth-clients no']);
    await strict.start([...tls, 'tls-auth-clients yes']);
  });
  after(async () => {
    await redis?.stop();
    await strict?.stop();
  });

  it('carries a whole run, with certificates of an authority of one’s own', async () => {
    const url = redis.tls();
    const record = await wholeRun({ url, exchangeUrl: url, caFile: files.caFile });
    expect([record.phase, record.step]).to.deep.equal(['completed', 24]);
  });

  it('shows a certificate to a server that asks for one', async () => {
    expect(await verdict(strict.tls(), { caFile: files.caFile, ...files.client })).to.equal(null);
    const refused = await verdict(strict.tls(), { caFile: files.caFile });
    expect(refused).to.have.property('code').that.is.oneOf(['REDIS_TLS', 'REDIS_UNAVAILABLE']);
    expect(refused!.message).to.match(/certificate|TLS/i).and.not.include('\n');
  });

  it('says in one line what does not fit, and shows no password', async () => {
    const cases: [string, NnError | null, string, RegExp][] = [
      ['no authority', await verdict(redis.tls()), 'REDIS_TLS', /CUDA_NN_REDIS_CA/],
      ['another authority', await verdict(redis.tls(), { caFile: files.otherCaFile }), 'REDIS_TLS', /CUDA_NN_REDIS_CA/],
      ['another name', await verdict(redis.tls('localhost'), { caFile: files.caFile }), 'REDIS_TLS', /host name/],
      ['no TLS there', await verdict(`rediss://:${ADMIN}@127.0.0.1:${redis.port}`, { caFile: files.caFile }), 'REDIS_UNAVAILABLE', /does it speak TLS/],
      ['TLS there, not here', await verdict(`redis://:${ADMIN}@127.0.0.1:${redis.tlsPort}`), 'REDIS_UNAVAILABLE', /./],
      ['no such file', await verdict(redis.tls(), { caFile: '/nowhere/ca.pem' }), 'USAGE', /CUDA_NN_REDIS_CA: \/nowhere\/ca\.pem/],
      ['half a pair', await verdict(redis.tls(), { certificateFile: files.client.certificateFile }), 'USAGE', /go together/],
    ];
    for (const [what, error, code, text] of cases) {
      expect(error, what).to.have.property('code', code);
      expect(error!.message, what).to.match(text).and.not.include(ADMIN).and.not.include('\n');
    }
  });
});

describe('a Redis user with an ACL', function () {
  this.timeout(90_000);
  let redis: GuardedRedis;
  let admin: Redis;

  before(async () => {
    redis = await new GuardedRedis().start();
    admin = openRedis(redis.admin, loadConfig(), 'command');
  });
  after(async () => {
    admin?.disconnect();
    await redis?.stop();
  });

  const setUser = (name: string, rules: string): Promise<unknown> => admin.call('ACL', 'SETUSER', name, 'reset', 'on', `>${name}-password`, ...rules.split(' '));
  const urlOf = (name: string): string => `redis://${name}:${name}-password@127.0.0.1:${redis.port}`;

  it('needs no more than is documented for a whole run', async () => {
    await setUser('least', aclRules('nn'));
    await admin.call('ACL', 'LOG', 'RESET');
    const url = urlOf('least');
    const record = await wholeRun({ url, exchangeUrl: url });
    expect([record.phase, record.step]).to.deep.equal(['completed', 24]);
    expect(await admin.call('ACL', 'LOG')).to.deep.equal([]);
    expect(await admin.keys('*probe*')).to.deep.equal([]);
  });

  it('is told which command, key or channel it lacks', async () => {
    for (const command of ['zadd', 'evalsha', 'xread', 'info', 'publish', 'bzpopmin', 'multi', 'scan']) {
      await setUser('lacking', `${aclRules('nn')} -${command}`);
      const error = await verdict(urlOf('lacking'));
      expect(error, command).to.have.property('code', 'REDIS_AUTH');
      expect(error!.message, command).to.include(command).and.include('operations.md').and.not.include('lacking-password');
    }
    await setUser('elsewhere', aclRules('other'));
    expect((await verdict(urlOf('elsewhere')))!.message).to.include('keys and channels under nn:');
    await setUser('shut', aclRules('nn').replace('&nn:*', ''));
    expect((await verdict(urlOf('shut')))!.message).to.include('keys and channels under nn:');
    await setUser('least', aclRules('nn'));
    expect(await verdict(urlOf('least'))).to.equal(null);
    expect((await verdict(urlOf('least').replace('least-password', 'wrong')))!.message).to.include('refuses the user or password');
  });

  it('may run every command of BullMQ’s scripts, which an upgrade may change, and of ours', () => {
    const scripts = join(packageRoot(), 'node_modules/bullmq/dist/esm/scripts');
    const bullmq = readdirSync(scripts).filter((name) => name.endsWith('.js')).map((name) => readFileSync(join(scripts, name), 'utf8')).join('\n');
    const own = readdirSync(join(packageRoot(), 'orchestrator')).filter((name) => name.endsWith('.ts')).map((name) => readFileSync(join(packageRoot(), 'orchestrator', name), 'utf8')).join('\n');
    for (const [text, least] of [[bullmq, 40], [own, 8]] as const) {
      const used = new Set([...text.matchAll(/\br?(?:edis\.)?p?call\(\s*["']([A-Za-z]+)["']/g)].map((match) => match[1]!.toLowerCase()));
      expect(used.size).to.be.above(least);
      expect([...used].filter((command) => !REDIS_COMMANDS.includes(command))).to.deep.equal([]);
    }
  });
});
