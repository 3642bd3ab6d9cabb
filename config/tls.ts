/**
 * Which errors of a connection say that the other side is not trusted, rather than not there: waiting cures none of them. Used for
 * Redis (redis.ts) and for the store (workers/store-client.ts).
 */

const UNTRUSTED = /^(CERT_|DEPTH_ZERO_|SELF_SIGNED_|UNABLE_TO_|ERR_TLS_|ERR_SSL_|ERR_OSSL_|HOSTNAME_MISMATCH|EPROTO)/;

/** OpenSSL's or Node's code, where a certificate, its authority or its host name is not believed, or one side refuses the handshake; else null. */
export function untrusted(error: unknown): string | null {
  const code = (error as { code?: unknown } | null)?.code;
  return typeof code === 'string' && UNTRUSTED.test(code) ? code : null;
}
