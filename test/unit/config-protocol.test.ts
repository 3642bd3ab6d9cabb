/** What crosses process borders keeps its meaning: errors, messages, keys, settings, addresses. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect } from 'chai';
import { ERROR_KINDS, NnError, decodeFailure, encodeFailure, errorCode, fromErrorRecord, toErrorRecord } from '../../config/errors.ts';
import type { ErrorCode } from '../../config/errors.ts';
import { keys, workerQueue } from '../../config/keys.ts';
import { parseMessage, parseResult } from '../../config/messages.ts';
import { addressFile, redactUrl, redisAddresses } from '../../config/redis.ts';
import { knobs, loadConfig, packageRoot } from '../../config/schema.ts';

const codeOf = (work: () => unknown): ErrorCode | undefined => {
  try {
    work();
  } catch (error) {
    return errorCode(error);
  }
  return undefined;
};

describe('config: errors', () => {
  it('keep code, message and context as JSON, and through the one string that BullMQ keeps', () => {
    for (const code of Object.keys(ERROR_KINDS) as ErrorCode[]) {
      const error = new NnError(code, `what: "where"\nand why`, { step: 3, worker: null });
      expect(fromErrorRecord(JSON.parse(JSON.stringify(toErrorRecord(error))))).to.deep.include({ code, context: error.context, message: error.message });
      expect(decodeFailure(encodeFailure(error))).to.deep.equal(toErrorRecord(error));
    }
  });

  it('tell a bug from a failure, and keep its stack', () => {
    const record = decodeFailure(encodeFailure(new TypeError('x is not a function')));
    expect(record).to.include({ code: 'BUG', message: 'x is not a function' });
    expect(record.stack).to.include('TypeError');
    expect(fromErrorRecord(record)).to.have.property('stack', record.stack);
    expect(toErrorRecord('text')).to.deep.equal({ code: 'BUG', message: 'text', context: {} });
  });

  it('read reasons that are not ours', () => {
    expect(decodeFailure('job stalled more than allowable limit').code).to.equal('WORKER_LOST');
    expect(decodeFailure('TIMEOUT: too late')).to.include({ code: 'TIMEOUT', message: 'too late' });
    expect(decodeFailure('child nn:train:7 failed').code).to.equal('TIMEOUT');
    for (const reason of ['', '{broken', '{"code":"NOT_OURS","message":"x"}']) expect(decodeFailure(reason).code).to.equal('BUG');
  });

  it('are recognised by code alone', () => {
    expect(errorCode({ code: 'TIMEOUT' })).to.equal('TIMEOUT');
    for (const other of [null, undefined, 7, { code: 'ENOENT' }, new Error('x')]) expect(errorCode(other)).to.equal(undefined);
    expect(new NnError('TIMEOUT', 'x')).to.include({ recovery: 'retry', exitCode: 4 });
  });
});

describe('config: messages and keys', () => {
  const origin = { run: 'r', epoch: 0, checkpoint: null, spec: {} };

  it('refuse what is not of the protocol, naming the field', () => {
    expect(parseMessage('steps', { ...origin, fromStep: 0, stepCount: 3 })).to.include({ stepCount: 3 });
    expect(codeOf(() => parseMessage('steps', { ...origin, fromStep: 0, stepCount: 0 }))).to.equal('MESSAGE_INVALID');
    expect(() => parseMessage('shard', { ...origin, step: 1 })).to.throw(/job shard: shard/);
    expect(() => parseMessage('digest', { ...origin, step: 1, more: true })).to.throw(/more/);
    expect(codeOf(() => parseResult('digest', { worker: 'w', epoch: 0, step: 1, digest: 'short', weightsDigest: null }))).to.equal('MESSAGE_INVALID');
  });

  it('put every key of a run under one prefix, and queues under names that BullMQ takes', () => {
    const names = keys('nn');
    for (const key of [names.control('a'), names.wish('a'), names.events('a')]) expect(key.startsWith(`${names.run('a')}:`)).to.equal(true);
    for (const key of [names.shardGradient('a', 1, 2), names.reducedGradient('a', 1)]) expect(key.startsWith(names.exchangeOf('a'))).to.equal(true);
    expect(workerQueue('train', 'host-1')).not.to.include(':');
  });
});

describe('config: settings', () => {
  it('have a document, an environment name and a default each, no name twice', () => {
    const rows = knobs();
    expect(rows.length).to.be.above(30);
    expect(new Set(rows.map(({ env }) => env)).size).to.equal(rows.length);
    for (const { doc, env } of rows) {
      expect(doc).to.match(/\S/);
      expect(env).to.match(/^CUDA_NN_[A-Z_]+$/);
    }
  });

  it('refuse values out of bounds and unknown names, naming them', () => {
    expect(codeOf(() => loadConfig({ worker: { heartbeatMs: 1 } }))).to.equal('USAGE');
    expect(() => loadConfig({ worker: { heartbeatMs: 1 } })).to.throw(/heartbeatMs/);
    expect(codeOf(() => loadConfig({ worker: { heartbeat: 100 } }))).to.equal('USAGE');
    expect(loadConfig({ server: { port: 1234 } }).server.port).to.equal(1234);
  });

  it('know the package root', () => {
    expect(packageRoot()).to.be.a('string');
  });
});

describe('config: Redis addresses', () => {
  it('hide passwords in messages', () => {
    expect(redactUrl('redis://user:secret@host:1/0')).to.equal('redis://***@host:1/0');
    expect(redactUrl('unix:///a/b.sock?password=secret&db=1')).to.equal('unix:///a/b.sock?password=***&db=1');
  });

  it('come from the settings, else from the embedded server, else there are none', () => {
    const home = mkdtempSync(join(tmpdir(), 'nn-config-'));
    try {
      const config = loadConfig({ home, redis: { url: '', exchangeUrl: '' } });
      expect(codeOf(() => redisAddresses(config))).to.equal('REDIS_UNAVAILABLE');
      writeFileSync(addressFile(config), JSON.stringify({ url: 'unix:///q', exchangeUrl: 'unix:///x' }));
      expect(redisAddresses(config)).to.deep.equal({ url: 'unix:///q', exchangeUrl: 'unix:///x' });
      expect(redisAddresses(loadConfig({ home, redis: { url: 'redis://h', exchangeUrl: '' } }))).to.deep.equal({ url: 'redis://h', exchangeUrl: 'redis://h' });
    } finally {
      rmSync(home, { recursive: true });
    }
  });
});
