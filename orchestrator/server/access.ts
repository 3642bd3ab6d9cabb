/**
 * Who may ask the HTTP server for what. PURE but for its random session secret: from address, token and headers to yes or a
 * reason. On loopback the enemy is a web page in the user's browser (another origin, or a name that was bent to 127.0.0.1);
 * off loopback it is everybody, so a token is required. Called by server.ts.
 */
import { createHmac, randomBytes, timingSafeEqual } from 'node:crypto';
import { isIP } from 'node:net';
import { NnError } from '../../config/errors.ts';

export interface RequestFacts {
  readonly method: string;
  readonly host: string | undefined;
  readonly origin: string | undefined;
  readonly fetchSite: string | undefined;
  readonly authorization: string | undefined;
  readonly cookie: string | undefined;
}

export type Verdict = { readonly allowed: true } | { readonly allowed: false; readonly status: 401 | 403 | 421; readonly reason: string };

const COOKIE = 'nn_session';
const SAFE_METHODS = new Set(['GET', 'HEAD', 'OPTIONS']);
const yes: Verdict = { allowed: true };

/** Whether a name or address means this machine only. */
export function isLoopback(host: string): boolean {
  const name = host.replace(/^\[|\]$/g, '').toLowerCase();
  if (name === 'localhost' || name.endsWith('.localhost')) return true;
  return isIP(name) === 4 ? name.startsWith('127.') : name === '::1' || name === '::ffff:127.0.0.1';
}

/** The host name of a Host header, without port and brackets; '' when there is none that makes sense. */
function hostName(header: string | undefined): string {
  if (header === undefined || !/^(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d+)?$/i.test(header)) return '';
  return header.replace(/:\d+$/, '').replace(/^\[|\]$/g, '').toLowerCase();
}

const equal = (a: string, b: string): boolean => {
  const [left, right] = [Buffer.from(a), Buffer.from(b)];
  return left.length === right.length && timingSafeEqual(left, right);
};

export class Access {
  readonly #token: string;
  readonly #storeToken: string;
  readonly #host: string;
  readonly #secret = randomBytes(32);

  /** Throws USAGE for an address off loopback without a token of at least 16 characters. */
  constructor(host: string, token: string, storeToken = '') {
    this.#host = host;
    this.#token = token;
    this.#storeToken = storeToken;
    if (!isLoopback(host) && storeToken !== '' && storeToken.length < 16) {
      throw new NnError('USAGE', `to serve on ${host}, which others can reach, CUDA_NN_STORE_TOKEN must have at least 16 characters, or be left out`, { host });
    }
    if (!isLoopback(host) && token.length < 16) {
      const what = token === '' ? 'a token' : 'a token of at least 16 characters';
      throw new NnError('USAGE', `to serve on ${host}, which others can reach, set CUDA_NN_TOKEN to ${what} (openssl rand -hex 32); or serve on 127.0.0.1`, { host });
    }
  }

  get needsToken(): boolean {
    return this.#token !== '';
  }

  isToken(text: string): boolean {
    return this.needsToken && equal(text, this.#token);
  }

  /** The cookie that a right login gets: not the token itself, and void when the server restarts. */
  sessionCookie(): string {
    return `${COOKIE}=${this.#session()}; HttpOnly; SameSite=Strict; Path=/; Max-Age=604800`;
  }

  #session(): string {
    return createHmac('sha256', this.#secret).update(this.#token).digest('hex');
  }

  /** The rules that hold for every request: right name, and no writing from another site. */
  fromHere({ method, host, origin, fetchSite }: RequestFacts): Verdict {
    const name = hostName(host);
    if (isLoopback(this.#host) && !isLoopback(name) && name !== this.#host.toLowerCase()) {
      return { allowed: false, status: 421, reason: 'the Host header names another machine' };
    }
    if (SAFE_METHODS.has(method)) return yes;
    if (fetchSite !== undefined && fetchSite !== 'same-origin' && fetchSite !== 'none') return { allowed: false, status: 403, reason: 'requests from other sites may not change anything' };
    if (origin !== undefined && !sameOrigin(origin, host)) return { allowed: false, status: 403, reason: 'requests from other origins may not change anything' };
    return yes;
  }

  /** Whether the request may use the store: with the store's own token, which opens nothing else, or as `knows` says. */
  knowsStore(facts: RequestFacts): Verdict {
    const bearer = /^Bearer (.+)$/.exec(facts.authorization ?? '')?.[1];
    if (this.#storeToken !== '' && bearer !== undefined && equal(bearer, this.#storeToken)) return yes;
    if (this.needsToken) return this.knows(facts);
    return this.#storeToken === '' ? yes : { allowed: false, status: 401, reason: 'the store wants its token: set CUDA_NN_STORE_TOKEN to the same on both sides' };
  }

  /** Whether the request carries the token, or the cookie of a login. */
  knows({ authorization, cookie }: RequestFacts): Verdict {
    if (!this.needsToken) return yes;
    const bearer = /^Bearer (.+)$/.exec(authorization ?? '')?.[1];
    if (bearer !== undefined && this.isToken(bearer)) return yes;
    const session = (cookie ?? '').split(/;\s*/).find((each) => each.startsWith(`${COOKIE}=`))?.slice(COOKIE.length + 1);
    if (session !== undefined && equal(session, this.#session())) return yes;
    return { allowed: false, status: 401, reason: 'a token is required: send `Authorization: Bearer <CUDA_NN_TOKEN>`, or log in at /login' };
  }
}

function sameOrigin(origin: string, host: string | undefined): boolean {
  try {
    return new URL(origin).host === host;
  } catch (error) {
    if (error instanceof TypeError) return false;
    throw error;
  }
}
