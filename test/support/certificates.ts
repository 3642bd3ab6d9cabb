/**
 * Certificates made by openssl for one test: an authority of our own, a server's for given names, a client's, and one of another
 * authority. Used by redis-access.test.ts and store.test.ts in test/system.
 */
import { execFileSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';

export interface Certificates {
  readonly caFile: string;
  readonly server: { readonly certificateFile: string; readonly keyFile: string };
  readonly client: { readonly certificateFile: string; readonly keyFile: string };
  /** An authority that signed none of these. */
  readonly otherCaFile: string;
}

/** Why there can be no certificates here, or null. */
export function whyNoCertificates(): string | null {
  try {
    execFileSync('openssl', ['version'], { stdio: 'pipe' });
    return null;
  } catch (error) {
    return `openssl is needed for certificates (${(error as Error).message.split('\n')[0]})`;
  }
}

/** `names`: what the server's certificate is for, as in `IP:127.0.0.1` or `DNS:localhost`. */
export function makeCertificates(directory: string, names: readonly string[]): Certificates {
  const at = (name: string): string => join(directory, name);
  const openssl = (...args: string[]): void => void execFileSync('openssl', args, { stdio: 'pipe' });
  const key = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes'];
  for (const name of ['ca', 'other']) {
    openssl('req', '-x509', ...key, '-keyout', at(`${name}.key`), '-out', at(`${name}.pem`), '-days', '2', '-subj', `/CN=cuda-nn test ${name}`, '-addext', 'basicConstraints=critical,CA:TRUE');
  }
  const signed = (name: string, extension: string): { certificateFile: string; keyFile: string } => {
    writeFileSync(at(`${name}.ext`), extension);
    openssl('req', ...key, '-keyout', at(`${name}.key`), '-out', at(`${name}.csr`), '-subj', `/CN=${name}`);
    openssl('x509', '-req', '-in', at(`${name}.csr`), '-CA', at('ca.pem'), '-CAkey', at('ca.key'), '-CAcreateserial', '-days', '2', '-extfile', at(`${name}.ext`), '-out', at(`${name}.pem`));
    return { certificateFile: at(`${name}.pem`), keyFile: at(`${name}.key`) };
  };
  return { caFile: at('ca.pem'), otherCaFile: at('other.pem'), server: signed('server', `subjectAltName=${names.join(',')}`), client: signed('client', 'extendedKeyUsage=clientAuth') };
}
