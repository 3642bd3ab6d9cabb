/**
 * Where the files that a job names lie on this machine. Jobs and specs name them as the orchestrator's host has them; without
 * a store that is the same here, and with one the main thread has brought them into its cache before the task begins. Owned
 * by the compute thread, filled from each task; whoever opens a file of a job asks here.
 */
export class Places {
  #local: Readonly<Record<string, string>> = {};

  /** What holds from now on: path as the job names it -> path here. */
  use(local: Readonly<Record<string, string>> = {}): void {
    this.#local = local;
  }

  /** The path here of a file or directory that a job names. */
  of(path: string): string {
    return this.#local[path] ?? path;
  }
}
