/** Which answers of Redis are waited out: a run must not fail because Redis is full, loading or away for a while. */
import { expect } from 'chai';
import { isTransient } from '../../orchestrator/transient.ts';

const error = (name: string, message: string): Error => Object.assign(new Error(message), { name });

describe('orchestrator: failures of Redis', () => {
  for (const message of [
    "OOM command not allowed when used memory > 'maxmemory'.", 'EXECABORT Transaction discarded because of previous errors.', 'LOADING Redis is loading the dataset in memory',
    "READONLY You can't write against a read only replica.", 'MISCONF Errors writing to the AOF file', 'NOAUTH Authentication required.',
  ]) {
    it(`pass: ${message}`, () => expect(isTransient(error('ReplyError', message))).to.equal(true));
  }
  for (const message of ['Connection is closed.', 'connect ECONNREFUSED 127.0.0.1:6379', 'write EPIPE', 'Socket timeout. Expecting data, but didn’t receive any in 20000ms.']) {
    it(`pass: ${message}`, () => expect(isTransient(error('Error', message))).to.equal(true));
  }
  it('pass: retries that were used up', () => expect(isTransient(error('MaxRetriesPerRequestError', 'Reached the max retries per request limit (which is 20).'))).to.equal(true));

  for (const [name, message] of [['ReplyError', 'ERR unknown command'], ['ReplyError', 'WRONGTYPE Operation against a key'], ['TypeError', 'x is not a function']] as const) {
    it(`stay: ${message}`, () => expect(isTransient(error(name, message))).to.equal(false));
  }
});
