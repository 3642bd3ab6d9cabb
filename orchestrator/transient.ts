/** Which failures of Redis pass: an effect that met one is tried again, any other fails the run. PURE. Called by driver.ts. */

/**
 * Redis is away, full, loading, read-only, failing over, or has yet to be told its users: another attempt may succeed. EXECABORT is the answer to a transaction
 * of which a command was refused for one of these reasons; nothing of it was done.
 */
export function isTransient(error: unknown): boolean {
  const { name, message } = error as Error;
  if (name === 'MaxRetriesPerRequestError') return true;
  if (name === 'ReplyError') return /^(OOM|EXECABORT|LOADING|READONLY|MASTERDOWN|CLUSTERDOWN|TRYAGAIN|BUSY|NOREPLICAS|MISCONF|NOAUTH|WRONGPASS|NOPERM)/.test(message);
  return /Connection is closed|ECONN|EPIPE|ETIMEDOUT|ENOENT.*sock|Stream isn't writeable|Command timed out|Socket timeout/.test(message);
}
