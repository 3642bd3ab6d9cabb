/**
 * Which versions of Redis and Valkey carry CVE-2025-49844, a use-after-free in Lua scripts that a client with a password
 * can turn into code execution. BullMQ needs Lua, so it cannot be switched off. Pure. Called by `doctor`.
 */

/** First good release of each line; a line that is not listed and lower than the last never got one. */
const MENDED: Record<'redis' | 'valkey', readonly string[]> = {
  redis: ['6.2.20', '7.2.11', '7.4.6', '8.0.4', '8.2.2'],
  valkey: ['7.2.11', '8.0.6', '8.1.4'],
};

const parts = (version: string): number[] => version.split('.').map(Number);

/** What to tell about a version, or undefined if it is mended. Distributors mend older ones under the old number. */
export function luaAdvisory(kind: 'redis' | 'valkey', version: string): string | undefined {
  const [major = 0, minor = 0, patch = 0] = parts(version);
  if (!/^\d+\.\d+(\.\d+)?/.test(version)) return 'its version cannot be told';
  const lines = MENDED[kind].map(parts) as [number, number, number][];
  const same = lines.find(([a, b]) => a === major && b === minor);
  const [lastMajor, lastMinor] = lines.at(-1)!;
  const newer = major > lastMajor || (major === lastMajor && minor > lastMinor);
  if (newer || (same !== undefined && patch >= same[2])) return undefined;
  return 'this version carries CVE-2025-49844 (Lua) unless its distributor has mended it: keep it private, or upgrade';
}
