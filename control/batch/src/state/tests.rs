use super::*;

fn batch() -> Batch {
    let order = Order {
        endpoint: Endpoint::ChatCompletions,
        input_file_id: "file-1".into(),
        completion_window: "24h".into(),
        window_s: 86_400,
        metadata: None,
        output_expires_after_s: None,
        aibrix: None,
    };
    Batch::new("batch_1".into(), "team".into(), order, 1_000)
}

fn validated() -> Change {
    Change::Validated {
        model: Some("m".into()),
        total: 3,
    }
}

fn finish() -> Change {
    Change::Finish {
        output_file_id: Some("file-2".into()),
        error_file_id: None,
    }
}

fn record(completed: u64, failed: u64) -> Change {
    Change::Record {
        completed,
        failed,
        expired: false,
        usage: Usage {
            input_tokens: 2,
            output_tokens: 3,
            total_tokens: 5,
            ..Usage::default()
        },
    }
}

fn expired() -> Change {
    Change::Record {
        completed: 0,
        failed: 1,
        usage: Usage::default(),
        expired: true,
    }
}

#[test]
fn a_batch_lives_through_its_states_and_keeps_every_time() {
    let mut batch = batch();
    assert_eq!(batch.expires_at, 1_000 + 86_400);
    for (at, change) in [
        (1_001, validated()),
        (1_002, record(2, 0)),
        (1_003, record(0, 1)),
        (1_004, Change::Finalize),
        (1_005, finish()),
    ] {
        batch.apply(change, at).unwrap();
    }
    assert_eq!(batch.status(), Status::Completed);
    let expected = Times {
        in_progress_at: Some(1_001),
        finalizing_at: Some(1_004),
        completed_at: Some(1_005),
        ..Times::default()
    };
    assert_eq!(batch.times(), &expected);
    let counts = Counts {
        total: 3,
        completed: 2,
        failed: 1,
    };
    assert_eq!(batch.counts(), counts);
    assert_eq!(batch.usage().total_tokens, 10);
    assert_eq!(batch.output_file_id(), Some("file-2"));
}

#[test]
fn a_cancelled_batch_keeps_its_partial_output_whenever_it_is_cancelled() {
    let paths = [
        vec![Change::Cancel, validated(), Change::Finalize, finish()],
        vec![validated(), Change::Cancel, record(1, 2), finish()],
        vec![validated(), Change::Finalize, Change::Cancel, finish()],
    ];
    for path in paths {
        let mut batch = batch();
        for change in path {
            batch.apply(change, 2_000).unwrap();
        }
        assert_eq!(batch.status(), Status::Cancelled);
        assert_eq!(batch.output_file_id(), Some("file-2"));
        assert!(batch.times().cancelled_at.is_some() && batch.times().completed_at.is_none());
    }
}

#[test]
fn an_expired_batch_passes_finalizing() {
    let mut batch = batch();
    batch.apply(validated(), 1).unwrap();
    batch.apply(expired(), 1).unwrap();
    batch.apply(Change::Finalize, 2).unwrap();
    batch.apply(finish(), 3).unwrap();
    assert_eq!(batch.status(), Status::Expired);
    assert_eq!(batch.times().expired_at, Some(3));
}

fn give_up() -> Change {
    Change::GiveUp {
        errors: vec![LineError {
            code: "input_file_unavailable".into(),
            message: String::new(),
            param: None,
            line: None,
        }],
        output_file_id: Some("file-2".into()),
        error_file_id: None,
    }
}

#[test]
fn a_batch_that_has_lost_its_input_ends_as_its_state_says_and_keeps_its_output() {
    let late = 1_000 + 86_400;
    for (path, at, end) in [
        (vec![validated(), record(1, 1)], 2_000, Status::Failed),
        (vec![validated(), Change::Finalize], 2_000, Status::Failed),
        (vec![validated(), record(1, 0)], late, Status::Expired),
        (vec![validated(), Change::Cancel], 2_000, Status::Cancelled),
    ] {
        let mut batch = batch();
        for change in path {
            batch.apply(change, 2_000).unwrap();
        }
        batch.apply(give_up(), at).unwrap();
        assert_eq!(batch.status(), end);
        assert_eq!(batch.output_file_id(), Some("file-2"));
        assert_eq!(batch.errors().len(), 1);
        let counts = batch.counts();
        assert_eq!(counts.completed + counts.failed, counts.total);
    }
    assert!(batch().apply(give_up(), 2_000).is_err());
}

#[test]
fn nothing_changes_a_batch_that_has_ended_but_cancelling_twice_is_no_error() {
    let ends = [
        vec![validated(), Change::Finalize, finish()],
        vec![validated(), expired(), Change::Finalize, finish()],
        vec![Change::Reject { errors: vec![] }],
        vec![Change::Cancel, Change::Reject { errors: vec![] }],
    ];
    for path in ends {
        let mut batch = batch();
        for change in path {
            batch.apply(change, 2_000).unwrap();
        }
        let ended = batch.clone();
        assert!(ended.status().is_terminal());
        for change in [validated(), record(1, 0), Change::Finalize, finish()] {
            assert!(batch.apply(change, 3_000).is_err());
        }
        let cancelled = batch.apply(Change::Cancel, 3_000);
        assert_eq!(cancelled.is_ok(), ended.status() == Status::Cancelled);
        assert_eq!(batch, ended);
    }
}

#[test]
fn results_cannot_be_recorded_once_the_files_are_being_assembled() {
    let mut batch = batch();
    batch.apply(validated(), 1).unwrap();
    batch.apply(Change::Finalize, 2).unwrap();
    assert!(batch.apply(record(1, 0), 3).is_err());
}

#[test]
fn only_the_first_line_errors_are_kept() {
    let errors = vec![
        LineError {
            code: "invalid_json_line".into(),
            message: String::new(),
            param: None,
            line: Some(1),
        };
        ERRORS_KEPT + 1
    ];
    let mut batch = batch();
    batch.apply(Change::Reject { errors }, 1).unwrap();
    assert_eq!(batch.errors().len(), ERRORS_KEPT);
}

#[test]
fn a_batch_survives_being_stored() {
    let mut batch = batch();
    batch.apply(validated(), 1).unwrap();
    let stored = serde_json::to_string(&batch).unwrap();
    assert_eq!(serde_json::from_str::<Batch>(&stored).unwrap(), batch);
}
