/**
 * The embedded Redis: private, one for each home, launched again when it dies, and gone when its owner is, however that
 * went. Real servers and real SIGKILL.
 */
import { fork } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdtempSync, readFileSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect } from 'chai';
import { findRedisServer, redisConfiguration, socketDirectory, startEmbeddedRedis } from '../../cli/embedded-redis.ts';
import { isAlive } from '../../cli/home-lock.ts';
import type { ProcessName } from '../../cli/home-lock.ts';
import { errorCode } from '../../config/errors.ts';
import { openRedis } from '../../config/redis.ts';
import { loadConfig } from '../../config/schema.ts';
import type { Config } from '../../config/schema.ts';
import { until } from '../support/wait.ts';

const owner = fileURLToPath(new URL('./redis-owner.js', import.meta.url));
const serversOf = (home: string): ProcessName[] => JSON.parse(readFileSync(join(home, 'redis', 'processes.json'), 'utf8')) as ProcessName[];

/** What a call is refused with. */
async function refusal(call: () => unknown): Promise<{ code: string | undefined; message: string }> {
  try {
    await call();
  } catch (error) {
    return { code: errorCode(error), message: (error as Error).message };
  }
  throw new Error('nothing was thrown');
}

describe('embedded Redis', function () {
  this.timeout(60_000);
  let home: string;
  let config: Config;
  let child: ChildProcess | undefined;

  beforeEach(() => {
    home = mkdtempSync(join(tmpdir(), 'cuda-nn-redis-'));
    config = loadConfig({ home, redis: { url: '' } });
  });
  afterEach(() => {
    child?.kill('SIGKILL');
    child = undefined;
    rmSync(home, { recursive: true, force: true });
  });

  it('is private, refuses eviction, keeps the queues’ data, and leaves nothing running', async () => {
    const redis = await startEmbeddedRedis(config);
    const servers = serversOf(home);
    try {
      const addresses = JSON.parse(readFileSync(join(home, 'redis.json'), 'utf8')) as typeof redis.addresses;
      expect(addresses).to.deep.equal(redis.addresses);
      for (const file of ['redis.json', 'redis/queues.conf', 'redis/exchange.conf']) expect(statSync(join(home, file)).mode & 0o777, file).to.equal(0o600);
      for (const socket of ['redis/queues.sock', 'redis/exchange.sock']) expect(statSync(join(home, socket)).mode & 0o777, socket).to.equal(0o700);
      for (const url of Object.values(addresses)) {
        const connection = openRedis(url, config, 'command');
        expect(await connection.info('memory')).to.contain('maxmemory_policy:noeviction');
        expect(await connection.info('persistence')).to.contain(`aof_enabled:${url === addresses.url ? 1 : 0}`);
        await connection.set('kept', '1');
        connection.disconnect();
      }
      const password = new URL(addresses.url).searchParams.get('password')!;
      expect(password.length).to.be.at.least(32);
      if (existsSync('/proc/self/cmdline')) {
        const commands = readdirSync('/proc').filter((name) => /^\d+$/.test(name)).map((pid) => {
          try {
            return readFileSync(`/proc/${pid}/cmdline`, 'utf8');
          } catch {
            return ''; // it ended meanwhile
          }
        });
        expect(commands.filter((command) => command.includes(password))).to.deep.equal([]);
      }
      const second = await refusal(() => startEmbeddedRedis(config));
      expect(second.code).to.equal('ALREADY_UP');
      expect(servers.every(isAlive)).to.equal(true);
    } finally {
      await redis.stop();
    }
    expect(servers.some(isAlive)).to.equal(false);
    expect(readdirSync(home)).to.deep.equal(['redis']);
    expect(readdirSync(join(home, 'redis')).filter((name) => /sock|conf|json/.test(name))).to.deep.equal([]);

    const again = await startEmbeddedRedis(config);
    try {
      const [queues, exchange] = [again.addresses.url, again.addresses.exchangeUrl].map((url) => openRedis(url, config, 'command'));
      expect(await queues!.get('kept')).to.equal('1');
      expect(await exchange!.get('kept')).to.equal(null);
      queues!.disconnect();
      exchange!.disconnect();
    } finally {
      await again.stop();
    }
  });

  it('launches a killed server again, on the same address', async () => {
    const events: string[] = [];
    const redis = await startEmbeddedRedis(config, (text) => events.push(text));
    try {
      const connection = openRedis(redis.addresses.url, config, 'blocking');
      await connection.set('before', '1');
      await until('the write is on disk', async () => (await connection.info('persistence')).includes('aof_pending_bio_fsync:0'));
      const [queues] = serversOf(home);
      process.kill(queues!.pid, 'SIGKILL');
      await until('a new server', () => serversOf(home)[0]!.pid !== queues!.pid && serversOf(home).length === 2);
      expect(await connection.get('before')).to.equal('1');
      expect(events.join()).to.contain('the server of the queues ended (SIGKILL)');
      connection.disconnect();
    } finally {
      await redis.stop();
    }
  });

  it('ends with its owner, even by SIGKILL, and the next one starts in the same home', async () => {
    child = fork(owner, [home], { stdio: ['ignore', 'inherit', 'inherit', 'ipc'] });
    await once(child, 'message');
    const servers = serversOf(home);
    expect(servers).to.have.length(2);
    expect(servers.every(isAlive)).to.equal(true);
    child.kill('SIGKILL');
    await once(child, 'exit');
    await until('the servers end', () => !servers.some(isAlive));
    const redis = await startEmbeddedRedis(config);
    await redis.stop();
  });

  it('uses a short path for its sockets where the home’s is too long or odd', async () => {
    expect(socketDirectory(home)).to.equal(join(home, 'redis'));
    const long = join(home, 'with spaces', 'x'.repeat(100));
    const sockets = socketDirectory(long);
    expect(sockets.startsWith(tmpdir())).to.equal(true);
    const redis = await startEmbeddedRedis(loadConfig({ home: long, redis: { url: '' } }));
    expect(statSync(sockets).mode & 0o777).to.equal(0o700);
    const connection = openRedis(redis.addresses.url, config, 'command');
    expect(await connection.ping()).to.equal('PONG');
    connection.disconnect();
    await redis.stop();
    expect(existsSync(sockets)).to.equal(false);
  });

  it('says in one line that there is no server, or that it does not start', async () => {
    expect((await refusal(() => findRedisServer(config, '/nowhere'))).code).to.equal('REDIS_UNAVAILABLE');
    const broken = join(home, 'broken-server');
    writeFileSync(broken, '#!/bin/sh\nexit 3\n', { mode: 0o755 });
    const { code, message } = await refusal(() => startEmbeddedRedis(loadConfig({ home, redis: { url: '', server: broken } })));
    expect(code).to.equal('REDIS_UNAVAILABLE');
    expect(message).to.contain('exit 3').and.not.to.contain('\n');
    expect(existsSync(join(home, 'up.lock'))).to.equal(false);
    const missing = await refusal(() => startEmbeddedRedis(loadConfig({ home, redis: { url: '', server: 'no-such-server' } })));
    expect(missing.code).to.equal('REDIS_UNAVAILABLE');
  });

  it('writes paths and passwords into its configuration safely', () => {
    const text = redisConfiguration('queues', '/a "b"\\c', '/s', 'secret');
    expect(text).to.contain('dir "/a \\"b\\"\\\\c/queues"').and.to.contain('port 0\n').and.to.contain('appendfsync everysec');
    expect(redisConfiguration('exchange', '/a', '/s', 'secret')).to.contain('appendonly no');
  });
});
