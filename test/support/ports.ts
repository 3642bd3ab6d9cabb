/**
 * TCP ports for servers that must be told theirs, and may come back to it. They lie below the ports that the system hands out by
 * itself, so that no connection of a test that runs beside takes one before it is used. Called by test/system.
 */
import { randomInt } from 'node:crypto';
import { createServer } from 'node:net';

/** Linux hands out ports from 32768, others from 49152. */
const [LOWEST, HIGHEST] = [12_000, 32_000];
const TRIES = 100;

/** A port of 127.0.0.1 on which nobody listens. Throws after a hundred that are taken. */
export async function freePort(): Promise<number> {
  for (let tries = 0; tries < TRIES; tries++) {
    const port = randomInt(LOWEST, HIGHEST);
    const free = await new Promise<boolean>((settle) => {
      const server = createServer();
      server.once('error', () => settle(false));
      server.listen(port, '127.0.0.1', () => server.close(() => settle(true)));
    });
    if (free) return port;
  }
  throw new Error(`no free port between ${LOWEST} and ${HIGHEST} in ${TRIES} tries`);
}
