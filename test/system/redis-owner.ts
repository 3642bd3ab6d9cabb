/** A process that owns an embedded Redis in the home named by its argument, until it is killed. For cli-embedded-redis.test.ts. */
import { startEmbeddedRedis } from '../../cli/embedded-redis.ts';
import { loadConfig } from '../../config/schema.ts';

const redis = await startEmbeddedRedis(loadConfig({ home: process.argv[2]!, redis: { url: '' } }));
process.on('disconnect', () => void redis.stop());
process.send!('ready');
