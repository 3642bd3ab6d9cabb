/**
 * A TCP proxy before a unix socket whose network can be disturbed: one way or both ways go silent (bytes wait, nothing is
 * closed, as when a cable is out), then live again or are cut; or old connections are forgotten while new ones work, as by a
 * firewall that lost its table. Used by the fault tests and chaos, between processes and Redis.
 */
import { createConnection, createServer } from 'node:net';
import type { AddressInfo, Server, Socket } from 'node:net';

/** `up`: what clients say is not heard. `down`: what they are answered is not. */
export type Silence = 'up' | 'down' | 'both';

interface Pair {
  readonly client: Socket;
  server: Socket | null;
  /** Nothing passes, ever again. */
  stranded: boolean;
  /** One side ended while the other could not hear of it. */
  ended: boolean;
}

export class Proxy {
  readonly #server: Server;
  readonly #target: string;
  readonly #pairs = new Set<Pair>();
  #silence: Silence | null = null;

  private constructor(target: string) {
    this.#target = target;
    this.#server = createServer({ pauseOnConnect: true, allowHalfOpen: false }, (client) => this.#accept(client));
  }

  /** Listens on a free port of 127.0.0.1 for connections to the unix socket `target`. */
  static async listen(target: string): Promise<Proxy> {
    const proxy = new Proxy(target);
    await new Promise<void>((resolve, reject) => proxy.#server.once('error', reject).listen(0, '127.0.0.1', resolve));
    return proxy;
  }

  get port(): number {
    return (this.#server.address() as AddressInfo).port;
  }

  /** Connections there are now. */
  get connections(): number {
    return this.#pairs.size;
  }

  /** From now on nothing passes that way; who connects waits. */
  silence(way: Silence): void {
    this.#silence = way;
    for (const pair of this.#pairs) this.#flow(pair);
  }

  /** Everything passes again, what waited too. */
  heal(): void {
    this.#silence = null;
    for (const pair of this.#pairs) {
      if (pair.ended && !pair.stranded) this.#drop(pair);
      else if (pair.server === null) this.#connect(pair);
      else this.#flow(pair);
    }
  }

  /** Closes every connection there is, and lets new ones pass. */
  cut(): void {
    this.#silence = null;
    for (const pair of this.#pairs) this.#drop(pair);
  }

  /** Connections there are stay silent for ever, without being closed; new ones pass. */
  strand(): void {
    for (const pair of this.#pairs) {
      pair.stranded = true;
      this.#flow(pair);
    }
  }

  async close(): Promise<void> {
    this.cut();
    await new Promise((resolve) => this.#server.close(resolve));
  }

  #accept(client: Socket): void {
    const pair: Pair = { client, server: null, stranded: false, ended: false };
    this.#pairs.add(pair);
    client.setNoDelay(true);
    client.on('error', () => undefined);
    client.on('close', () => this.#ended(pair));
    if (this.#silence === null) this.#connect(pair);
  }

  #connect(pair: Pair): void {
    const server = createConnection(this.#target);
    pair.server = server;
    server.on('error', () => undefined);
    server.on('close', () => this.#ended(pair));
    server.pause();
    this.#pass(pair, pair.client, server, 'up');
    this.#pass(pair, server, pair.client, 'down');
    this.#flow(pair);
  }

  #pass(pair: Pair, from: Socket, to: Socket, way: 'up' | 'down'): void {
    from.on('data', (bytes) => {
      if (!to.write(bytes)) from.pause();
    });
    to.on('drain', () => {
      if (this.#passes(pair, way)) from.resume();
    });
  }

  #passes(pair: Pair, way: 'up' | 'down'): boolean {
    return !pair.stranded && this.#silence !== 'both' && this.#silence !== way;
  }

  /** Lets both ways pass, or not, as things stand. */
  #flow(pair: Pair): void {
    if (this.#passes(pair, 'up')) pair.client.resume();
    else pair.client.pause();
    if (this.#passes(pair, 'down')) pair.server?.resume();
    else pair.server?.pause();
  }

  /** One side is gone: the other hears of it, unless the network is silent. */
  #ended(pair: Pair): void {
    pair.ended = true;
    if (this.#silence === null && !pair.stranded) this.#drop(pair);
  }

  #drop(pair: Pair): void {
    this.#pairs.delete(pair);
    pair.client.destroy();
    pair.server?.destroy();
  }
}
