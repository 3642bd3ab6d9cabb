/** What work fails with, as the tests of workers ask for it. */
import { errorCode } from '../../config/errors.ts';

/** The code of the error that the work rejects with, or its text when it has none; undefined: it succeeds. */
export const codeOf = (work: Promise<unknown>): Promise<string | undefined> => work.then(() => undefined, (error: unknown) => errorCode(error) ?? String(error));
