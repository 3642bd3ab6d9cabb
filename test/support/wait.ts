/**
 * How tests wait: for what they name, looking every few milliseconds, and never longer than a deadline. It knows nothing of what is
 * waited for. Used by everything in test that waits for another process.
 */

/** What `probe` gives, once it gives something; throws when it does not within the deadline. */
export async function eventually<Value>(what: string, probe: () => Value | undefined | Promise<Value | undefined>, deadlineMs = 30_000, pauseMs = 5): Promise<Value> {
  const end = performance.now() + deadlineMs;
  for (;;) {
    const value = await probe();
    if (value !== undefined) return value;
    if (performance.now() > end) throw new Error(`${what}: not within ${deadlineMs} ms`);
    await new Promise((resolve) => setTimeout(resolve, pauseMs));
  }
}

/** Resolves when `holds` does; throws when it does not within the deadline. */
export async function until(what: string, holds: () => Promise<boolean> | boolean, deadlineMs?: number, pauseMs?: number): Promise<void> {
  await eventually(what, async () => ((await holds()) ? true : undefined), deadlineMs, pauseMs);
}
