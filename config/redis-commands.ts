/**
 * The Redis commands that BullMQ and this project use, as an ACL user needs them, each with arguments that it would accept on a
 * key of ours. A user limited to them and to our prefix can do all that a run needs and nothing else. Pure; redis.ts probes a
 * server with the list, docs/operations.md shows it as one line, a test compares it with BullMQ's scripts.
 */

/** K: a key under the prefix; C: a channel under it. `client|setname`: one subcommand only. */
const SHAPES = `
del K; exists K; expire K 0; pexpire K 0; pexpireat K 0; persist K; pttl K; rename K K; scan 0 MATCH K; time; type K; unlink K;
get K; incr K; incrby K 1; mget K; set K 0;
hdel K f; hexists K f; hget K f; hgetall K; hincrby K f 0; hlen K; hmget K f; hmset K f 0; hscan K 0; hset K f 0; hsetnx K f 0;
lindex K 0; llen K; lpop K; lpos K x; lpush K x; lrange K 0 0; lrem K 0 x; lset K 0 x; ltrim K 0 0; rpop K; rpoplpush K K; rpush K x;
sadd K x; scard K; sismember K x; smembers K; srem K x; sscan K 0;
bzpopmin K 1; zadd K 0 x; zcard K; zcount K 0 0; zlexcount K - +; zpopmin K; zrange K 0 0; zrangebylex K - +; zrangebyscore K 0 0; zrem K x;
zremrangebyrank K 0 0; zremrangebyscore K 0 0; zrevrange K 0 0; zrevrangebyscore K 0 0; zscore K x;
xadd K * f 0; xdel K 0-1; xlen K; xrange K - +; xread STREAMS K 0; xrevrange K + -; xtrim K MAXLEN 0;
eval x 0; evalsha x 0; multi; exec; discard;
publish C x; subscribe C; unsubscribe C; psubscribe C; punsubscribe C; ping; info memory; select 0; quit; client|setname x
`;

interface Shape {
  /** As an ACL rule names it. */
  readonly command: string;
  readonly args: readonly string[];
}

const shapes: readonly Shape[] = SHAPES.split(';').map((text) => {
  const [command, ...args] = text.trim().split(' ') as [string, ...string[]];
  return { command, args };
});

/** The commands as ACL rules name them. */
export const REDIS_COMMANDS: readonly string[] = shapes.map(({ command }) => command);

/** Those that Redis lets nobody queue in a transaction, or that mean the transaction itself: they cannot be probed without being done. */
const UNPROBED = ['multi', 'exec', 'discard', 'subscribe', 'unsubscribe', 'psubscribe', 'punsubscribe', 'quit'];

/** What to queue in a transaction, and to discard, to learn what a user may do: each command, with subcommand and arguments. */
export function probes(prefix: string): readonly (readonly [string, ...string[]])[] {
  const name: Record<string, string> = { K: `${prefix}:probe`, C: `${prefix}:probe` };
  return shapes
    .filter(({ command }) => !UNPROBED.includes(command))
    .map(({ command, args }) => [...command.split('|'), ...args.map((arg) => name[arg] ?? arg)] as [string, ...string[]]);
}

/** The rules of `ACL SETUSER` for a user who may do what is needed with this prefix and nothing else, without its password. */
export const aclRules = (prefix: string): string => `resetkeys ~${prefix}:* resetchannels &${prefix}:* -@all ${REDIS_COMMANDS.map((command) => `+${command}`).join(' ')}`;
