/**
 * The one table of expected failures. Every code has a recovery, an exit code of the command line and a one-line
 * meaning; docs/operations.md lists the same codes (a test compares the two). Imports nothing.
 *
 * A bug is an assertion (`assert` of node:assert), never one of these.
 */

/**
 * What may be done about a failure without a person:
 * - `never`: the same input fails again; BullMQ must not retry (UnrecoverableError).
 * - `retry`: another attempt, later or elsewhere, may succeed.
 * - `restart`: the process that met it reports it and exits; its supervisor starts a new one, which may succeed.
 */
export type Recovery = 'never' | 'retry' | 'restart';

interface ErrorKind {
  readonly recovery: Recovery;
  /** Exit code of the command line: 2 bad input, 3 not found or conflict, 4 environment, 5 damaged data, 6 run failed. */
  readonly exitCode: number;
  readonly meaning: string;
}

const kind = (recovery: Recovery, exitCode: number, meaning: string): ErrorKind => ({ recovery, exitCode, meaning });

export const ERROR_KINDS = {
  // Bad input: 2
  USAGE: kind('never', 2, 'The command line or a setting is not understood.'),
  SPEC_INVALID: kind('never', 2, 'A run spec has an unknown key, a wrong type or an impossible value.'),
  MESSAGE_INVALID: kind('never', 2, 'A job payload or result is not of the form the protocol states.'),
  DATA_INVALID: kind('never', 2, 'Text or token data cannot be used: empty, too short, or ids beyond the vocabulary.'),
  // Not found or in conflict: 3
  RUN_NOT_FOUND: kind('never', 3, 'There is no run of that name.'),
  RUN_EXISTS: kind('never', 3, 'There is a run of that name already.'),
  RUN_STATE: kind('never', 3, 'The run is in a state in which this cannot be done.'),
  FILE_NOT_FOUND: kind('never', 3, 'A file or directory is not there, or may not be used.'),
  // The environment: 4
  REDIS_UNAVAILABLE: kind('retry', 4, 'Redis cannot be reached, and no redis-server is on the PATH to be started.'),
  REDIS_AUTH: kind('never', 4, 'Redis refuses the user or password.'),
  REDIS_TLS: kind('never', 4, 'There is no trusted TLS connection to Redis: its certificate, the CA or the host name do not fit.'),
  REDIS_POLICY: kind('never', 4, 'Redis may evict keys: its maxmemory-policy is not noeviction.'),
  ALREADY_UP: kind('never', 3, 'Another `cuda-nn up` runs in this home directory.'),
  REDIS_LOST: kind('retry', 4, 'Redis lost what it had confirmed; what is missing is planned again.'),
  PORT_IN_USE: kind('never', 4, 'The port is taken by another process.'),
  DISK_FULL: kind('retry', 4, 'The disk is full; what was complete before is kept.'),
  DISK_FAULT: kind('retry', 4, 'The disk, or the server of a network file system, reports an error.'),
  COMPILER_MISSING: kind('never', 4, 'No C compiler was found to build the native library.'),
  LIBRARY_INVALID: kind('never', 4, 'The native library is missing, or of another ABI version.'),
  DEVICE_UNAVAILABLE: kind('never', 4, 'The device is not there, too old, or its driver refuses.'),
  DEVICE_UNSUPPORTED: kind('never', 4, 'The native library has no kernel for that type, size or device.'),
  DEVICE_MEMORY: kind('never', 4, 'The model and its activations do not fit on the device.'),
  DEVICE_FAULT: kind('restart', 4, 'The device reported a fault; only a new process cures it.'),
  STORE_UNAVAILABLE: kind('retry', 4, 'The store of the orchestrator cannot be reached, or does not do what was asked.'),
  STORE_AUTH: kind('restart', 4, 'The store of the orchestrator refuses the token, or is not trusted: its certificate, the authority or the host name do not fit.'),
  NO_WORKER: kind('retry', 4, 'No worker serves this kind of job.'),
  TIMEOUT: kind('retry', 4, 'Something did not answer before its deadline.'),
  // Damaged data: 5
  TOKEN_FILE_INVALID: kind('never', 5, 'A token file is empty, truncated, damaged or of another format.'),
  TOKENIZER_INVALID: kind('never', 5, 'A tokenizer file is damaged, or does not fit the data or the model.'),
  CHECKPOINT_INVALID: kind('never', 5, 'A checkpoint is incomplete, damaged, or does not fit the model.'),
  GRADIENT_LOST: kind('retry', 5, 'A gradient in the exchange is missing or damaged; it is computed again.'),
  REPLICA_DIVERGED: kind('restart', 5, 'A replica holds other weights than the rest.'),
  GOLDEN_MISMATCH: kind('never', 5, 'This build does not reproduce the golden model within its tolerances.'),
  // The run: 6
  NON_FINITE: kind('never', 6, 'Too many steps in a row had NaN or infinite gradients.'),
  LOSS_SPIKE: kind('never', 6, 'The loss rose too far again after as many rollbacks as the spec allows.'),
  TIME_LIMIT: kind('never', 6, 'The run was running for as long as its spec allows; it stands at a checkpoint.'),
  JOB_FATAL: kind('never', 6, 'A job ended its worker process as often as is allowed.'),
  WORKER_LOST: kind('retry', 6, 'A worker process ended while it held a job.'),
  RUN_FAILED: kind('never', 6, 'The run failed; its record says why.'),
  CANCELLED: kind('never', 6, 'The run or job was cancelled.'),
} as const satisfies Record<string, ErrorKind>;

export type ErrorCode = keyof typeof ERROR_KINDS;

export type ErrorContext = Record<string, string | number | boolean | null | undefined>;

/** An expected failure. The message says what, where, and what to do about it, in one line. */
export class NnError extends Error {
  readonly code: ErrorCode;
  readonly context: ErrorContext;

  constructor(code: ErrorCode, message: string, context: ErrorContext = {}, cause?: unknown) {
    super(message, cause === undefined ? undefined : { cause });
    this.name = 'NnError';
    this.code = code;
    this.context = context;
  }

  get recovery(): Recovery {
    return ERROR_KINDS[this.code].recovery;
  }

  get exitCode(): number {
    return ERROR_KINDS[this.code].exitCode;
  }
}

/** An error as JSON: how it crosses threads, jobs and HTTP, where classes are lost. */
export interface ErrorRecord {
  readonly code: ErrorCode | 'BUG';
  readonly message: string;
  readonly context: ErrorContext;
  /** Stack of a bug; expected failures carry none. */
  readonly stack?: string;
}

/** The code of an expected failure, or undefined for anything else. Works on errors from other threads and modules. */
export function errorCode(error: unknown): ErrorCode | undefined {
  const code = (error as { code?: unknown } | null)?.code;
  return typeof code === 'string' && code in ERROR_KINDS ? (code as ErrorCode) : undefined;
}

export function toErrorRecord(error: unknown): ErrorRecord {
  const code = errorCode(error);
  const message = error instanceof Error ? error.message : String(error);
  if (code !== undefined) return { code, message, context: (error as NnError).context ?? {} };
  const stack = error instanceof Error ? error.stack : undefined;
  return { code: 'BUG', message, context: {}, ...(stack === undefined ? {} : { stack }) };
}

export function fromErrorRecord(record: ErrorRecord): Error {
  if (record.code !== 'BUG') return new NnError(record.code, record.message, record.context);
  const error = new Error(record.message);
  if (record.stack !== undefined) error.stack = record.stack;
  return error;
}

/** What BullMQ keeps of a failed job is one string, `failedReason`: this is how a worker puts its error there. */
export function encodeFailure(error: unknown): string {
  return JSON.stringify(toErrorRecord(error));
}

/** The other way round. A reason that is not ours (BullMQ's own) is WORKER_LOST for a stalled job, TIMEOUT for a failed child, else a BUG. */
export function decodeFailure(reason: string): ErrorRecord {
  if (reason.startsWith('{')) {
    try {
      const record = JSON.parse(reason) as Partial<ErrorRecord>;
      if (typeof record.message === 'string' && typeof record.code === 'string' && (record.code === 'BUG' || record.code in ERROR_KINDS)) {
        return { code: record.code, message: record.message, context: record.context ?? {}, ...(record.stack === undefined ? {} : { stack: record.stack }) };
      }
    } catch (error) {
      return { code: 'BUG', message: reason, context: { parse: (error as Error).message } };
    }
  }
  const named = /^([A-Z_]+): (.*)$/s.exec(reason);
  if (named !== null && (named[1] as string) in ERROR_KINDS) return { code: named[1] as ErrorCode, message: named[2]!, context: {} };
  // The child's own failure says why; that of its parent, which may be heard first, must not end a run that the other would not.
  if (/^child .* failed$/.test(reason)) return { code: 'TIMEOUT', message: `a job that it waited for failed (${reason})`, context: {} };
  if (/stalled/.test(reason)) return { code: 'WORKER_LOST', message: `the job lost its worker too often (${reason})`, context: {} };
  return { code: 'BUG', message: reason, context: {} };
}
