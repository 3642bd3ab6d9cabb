/**
 * Preloaded into a worker process by worker-evidence.test: its compute thread ends the process from C, between two steps, when the
 * file named by NN_TEST_CRASH appears. What the file holds says how: `SIGSEGV`, or `assert`, which prints and aborts.
 */
import { existsSync, readFileSync, unlinkSync } from 'node:fs';
import { isMainThread } from 'node:worker_threads';
import koffi from 'koffi';

const trigger = process.env['NN_TEST_CRASH'];
const library = koffi.load('libc.so.6');
const raise = library.func('int raise(int)') as (signal: number) => number;
const fail = library.func('void __assert_fail(const char *, const char *, unsigned int, const char *)') as (what: string, file: string, line: number, where: string) => void;
const SIGSEGV = 11;

if (!isMainThread && trigger !== undefined) {
  setInterval(() => {
    if (!existsSync(trigger)) return;
    const how = readFileSync(trigger, 'utf8');
    unlinkSync(trigger);
    if (how === 'SIGSEGV') raise(SIGSEGV);
    else fail('length == flat_length', 'optimizer.c', 123, 'nn_adamw_step');
  }, 5).unref();
}
