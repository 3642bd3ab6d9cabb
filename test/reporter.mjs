/**
 * Mocha's spec output, then one line of its own at the very end: `N passed, N failed, N skipped`, with the reasons of what
 * was skipped above it; or, with the option `report`, the same as JSON in that file, for test/main.ts to add up. Plain
 * JavaScript, so that .mocharc.json can name it before anything is built.
 */
import { writeFileSync } from 'node:fs';
import Mocha from 'mocha';

const { Spec } = Mocha.reporters;
const { EVENT_RUN_END, EVENT_TEST_FAIL, EVENT_TEST_PENDING } = Mocha.Runner.constants;

export default class Reporter extends Spec {
  constructor(runner, options) {
    super(runner, options);
    const skipped = [];
    const failed = [];
    const { report } = options.reporterOptions ?? {};
    runner.on(EVENT_TEST_PENDING, (test) => skipped.push(test.fullTitle()));
    runner.on(EVENT_TEST_FAIL, (test, error) => failed.push(`${test.fullTitle()}: ${String(error?.message ?? error).split('\n')[0]}`));
    runner.once(EVENT_RUN_END, () => {
      const { passes, failures } = runner.stats;
      if (report !== undefined) return writeFileSync(report, JSON.stringify({ passed: passes, failed, skipped }));
      for (const title of skipped) console.log(`skipped: ${title}`);
      console.log(`${passes} passed, ${failures} failed, ${skipped.length} skipped`);
    });
  }
}
