/**
 * Opens connections to Redis: the only file that imports ioredis. Finds the address (the configured one, else that of the
 * embedded server in <home>/redis.json), sets the options that each purpose needs, and turns refusals into our errors.
 */
import { readFileSync } from 'node:fs';
import { isIP } from 'node:net';
import { join } from 'node:path';
import { Redis } from 'ioredis';
import type { RedisOptions } from 'ioredis';
import { NnError } from './errors.ts';
import { probes } from './redis-commands.ts';
import type { Config } from './schema.ts';
import { untrusted } from './tls.ts';

export type { Redis };

/** Where an embedded server can be reached; written by `cuda-nn up` with mode 0600. */
export interface RedisAddresses {
  readonly url: string;
  readonly exchangeUrl: string;
}

export const addressFile = (config: Config): string => join(config.home, 'redis.json');

/** The configured addresses, else the embedded server's. Throws REDIS_UNAVAILABLE if there is neither. */
export function redisAddresses(config: Config): RedisAddresses {
  const { url, exchangeUrl } = config.redis;
  if (url !== '') return { url, exchangeUrl: exchangeUrl === '' ? url : exchangeUrl };
  let text: string;
  try {
    text = readFileSync(addressFile(config), 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
    throw new NnError('REDIS_UNAVAILABLE', `no Redis: nothing runs here (${addressFile(config)} is not there); start \`cuda-nn up\`, or set CUDA_NN_REDIS_URL`, {}, error);
  }
  return JSON.parse(text) as RedisAddresses;
}

/** An address without user and password, for messages: whatever stands before the last @, also in one that is malformed. */
export function redactUrl(url: string): string {
  return url.replace(/\/\/\S*@/, '//***@').replace(/([?&]password=)[^&]*/, '$1***');
}

/**
 * What a connection is for: `command` fails its commands after a bounded number of retries and a bounded wait;
 * `blocking` (BullMQ workers, subscribers, stream readers) waits for Redis as long as it takes.
 */
export type Purpose = 'command' | 'blocking';

/** Options for a connection to `url`: redis://, rediss:// (TLS), or unix:///path/to/socket?password=... */
function connectionOptions(url: string, config: Config, purpose: Purpose): RedisOptions {
  // An address that cannot be understood is not shown: nobody knows where in it the password is.
  if (!URL.canParse(url)) throw new NnError('USAGE', 'CUDA_NN_REDIS_URL or CUDA_NN_EXCHANGE_URL is no address; write redis://USER:PASSWORD@HOST:PORT, with odd characters as %XX');
  const parsed = new URL(url);
  const options: RedisOptions = {
    lazyConnect: true,
    connectTimeout: config.redis.connectTimeoutMs,
    // A network that forgot a connection tells nobody: without this a command on it would wait for ever.
    socketTimeout: config.redis.silenceMs,
    maxRetriesPerRequest: purpose === 'blocking' ? null : 20,
    enableReadyCheck: true,
    // Neither needed nor allowed to a user of the least set of commands.
    disableClientInfo: true,
    retryStrategy: (attempt) => Math.min(config.redis.retryMaximumMs, 50 * 2 ** Math.min(attempt, 10)),
  };
  if (parsed.protocol === 'unix:') {
    const password = parsed.searchParams.get('password');
    return { ...options, path: decodeURIComponent(parsed.pathname), ...(password === null ? {} : { password }) };
  }
  if (parsed.protocol !== 'redis:' && parsed.protocol !== 'rediss:') {
    throw new NnError('USAGE', `the Redis address ${redactUrl(url)} must start with redis://, rediss:// or unix://`);
  }
  return {
    ...options,
    host: parsed.hostname.replace(/^\[|\]$/g, ''),
    port: parsed.port === '' ? 6379 : Number(parsed.port),
    ...(parsed.username === '' ? {} : { username: decodeURIComponent(parsed.username) }),
    ...(parsed.password === '' ? {} : { password: decodeURIComponent(parsed.password) }),
    ...(/^\/\d+$/.test(parsed.pathname) ? { db: Number(parsed.pathname.slice(1)) } : {}),
    ...(parsed.protocol === 'rediss:' ? { tls: tlsOptions(parsed.hostname.replace(/^\[|\]$/g, ''), config) } : {}),
  };
}

/** Certificates are checked against the configured CA, or those that Node trusts, and against the name or address in the URL. */
function tlsOptions(host: string, { redis }: Config): NonNullable<RedisOptions['tls']> {
  const { caFile, certificateFile, keyFile } = redis;
  if ((certificateFile === '') !== (keyFile === '')) throw new NnError('USAGE', 'CUDA_NN_REDIS_CERTIFICATE and CUDA_NN_REDIS_KEY go together; set both or none');
  return {
    // The protocol knows no addresses here: the certificate is compared with them all the same.
    ...(isIP(host) === 0 ? { servername: host } : {}),
    ...(caFile === '' ? {} : { ca: contentsOf(caFile, 'CUDA_NN_REDIS_CA') }),
    ...(certificateFile === '' ? {} : { cert: contentsOf(certificateFile, 'CUDA_NN_REDIS_CERTIFICATE'), key: contentsOf(keyFile, 'CUDA_NN_REDIS_KEY') }),
  };
}

function contentsOf(path: string, env: string): Buffer {
  try {
    return readFileSync(path);
  } catch (error) {
    throw new NnError('USAGE', `${env}: ${path} cannot be read (${(error as NodeJS.ErrnoException).code})`, { path }, error);
  }
}

function refusal(error: Error, url: string): NnError {
  const at = redactUrl(url);
  const denied = /NOPERM.*?(?:run the '([^']+)'|access)/.exec(error.message);
  if (denied !== null) {
    const what = denied[1] === undefined ? 'a key that it needs' : `the command ${denied[1]}`;
    return new NnError('REDIS_AUTH', `Redis at ${at} denies its user ${what}; docs/operations.md has the ACL that is needed`, {}, error);
  }
  if (/WRONGPASS|NOAUTH|invalid username-password/.test(error.message)) {
    return new NnError('REDIS_AUTH', `Redis at ${at} refuses the user or password; check CUDA_NN_REDIS_URL`, {}, error);
  }
  const code = untrusted(error);
  if (code !== null) {
    return new NnError('REDIS_TLS', `no TLS with Redis at ${at} (${code}: ${oneLine(error.message)}); check CUDA_NN_REDIS_CA, the host name in the URL, and the server's certificate`, { code }, error);
  }
  return new NnError('REDIS_UNAVAILABLE', `Redis at ${at} cannot be reached (${oneLine(error.message)}); is it running${url.startsWith('rediss:') ? ', and does it speak TLS' : ''}?`, {}, error);
}

const oneLine = (text: string): string => text.trim().split('\n')[0]!;

/**
 * Makes a connection one that can be ended at any time. One that waits to be opened anew has no socket whose end could be heard
 * of: told to disconnect, it would neither open nor end, and who waits for its `end`, as BullMQ's workers do, would wait for ever.
 */
function endable(redis: Redis): Redis {
  return Object.assign(redis, {
    disconnect: (reconnect = false): void => {
      if (redis.status === 'reconnecting' && !reconnect) redis.status = 'wait'; // from which ioredis ends at once
      Redis.prototype.disconnect.call(redis, reconnect);
    },
    /** What BullMQ makes of the connection that it is given, for its blocking commands. */
    duplicate: (changes?: Partial<RedisOptions>): Redis => endable(new Redis({ ...redis.options, ...changes })),
  });
}

/** A connection that is not yet open (it opens at its first command) and never fails by an unhandled 'error' event. */
export function openRedis(url: string, config: Config, purpose: Purpose, onError: (error: Error) => void = () => undefined): Redis {
  const redis = endable(new Redis(connectionOptions(url, config, purpose)));
  redis.on('error', onError);
  return redis;
}

/** Throws REDIS_POLICY when the server at `url` may evict keys. */
export async function requirePolicy(redis: Redis, url: string): Promise<void> {
  const policy = /maxmemory_policy:(\S+)/.exec(await redis.info('memory'))?.[1];
  if (policy === 'noeviction') return;
  throw new NnError('REDIS_POLICY', `Redis at ${redactUrl(url)} has maxmemory-policy ${policy}, which may drop jobs; set it to noeviction`, { policy });
}

/**
 * Connects once, within connectTimeoutMs, and checks that this Redis will do: reachable, password right, noeviction, and
 * its user allowed what is needed. Throws REDIS_UNAVAILABLE, REDIS_AUTH, REDIS_TLS or REDIS_POLICY. Called by every process before it does anything else.
 */
export async function checkRedis(url: string, config: Config): Promise<void> {
  const redis = new Redis({ ...connectionOptions(url, config, 'command'), retryStrategy: () => null, maxRetriesPerRequest: 0 });
  let last: Error | undefined;
  redis.on('error', (error: Error) => {
    last = error;
  });
  try {
    await redis.connect();
    await requirePolicy(redis, url);
    await checkPermissions(redis, url, config.redis.prefix);
  } catch (error) {
    if (error instanceof NnError) throw error;
    throw refusal(last ?? (error as Error), url);
  } finally {
    // ioredis waits 2 s for the close of a stream that is closed already.
    if (redis.status !== 'close' && redis.status !== 'end') redis.disconnect();
  }
}

/** Queues every command that is needed in a transaction, which tells what the user may not do, and discards it. Throws REDIS_AUTH. */
async function checkPermissions(redis: Redis, url: string, prefix: string): Promise<void> {
  await redis.call('multi');
  const replies = await Promise.allSettled([...probes(prefix).map(([command, ...args]) => redis.call(command, ...args)), redis.call('discard')]);
  const denied = replies.flatMap((reply) => (reply.status === 'rejected' && (reply.reason as Error).message.startsWith('NOPERM') ? [(reply.reason as Error).message] : []));
  if (denied.length === 0) return;
  const commands = denied.flatMap((message) => /run the '([^']+)'/.exec(message)?.[1] ?? []);
  const other = commands.length < denied.length ? [`keys and channels under ${prefix}:`] : [];
  const lacking = [...commands, ...other].join(', ');
  throw new NnError('REDIS_AUTH', `the ACL of the user of Redis at ${redactUrl(url)} lacks ${lacking}; docs/operations.md has the line that is needed`, { lacking });
}
